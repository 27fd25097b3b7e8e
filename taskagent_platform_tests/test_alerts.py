"""Alerts, delivered to a real HTTP receiver and a real SMTP server."""

import pytest

from taskagent_platform.alerts import Alert, DeliveryError, Outbox, addresses, asset_link, run_link, what_serves
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import AlertSettings, load_settings
from taskagent_platform_tests.receivers import http_receiver, smtp_receiver

HOUR_S = 3600.0


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def clock():
    return Clock()


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def outbox(tmp_path, clock, *urls, send=None, **settings):
    chosen = AlertSettings(urls=urls, **settings)
    return Outbox(tmp_path, chosen, send=send, clock=clock, sleep=lambda seconds: None)


def alert(key="gate", **more):
    facts = more.pop(
        "facts", [("What", "Argument extraction is 81.5% and must be greater than 90.0%: 8.5 points short.")]
    )
    return Alert.now(key, more.pop("title", "A gate blocks the model of task_api"), "failure", facts)


class Recorded:
    """Takes messages, or refuses them."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, str]] = []
        self.tries = 0
        self.down: set[str] = set()

    def __call__(self, url, title, text, severity):
        self.tries += 1
        if url in self.down:
            raise DeliveryError("it is down.")
        self.taken.append((url, title, text))


def test_an_alert_reaches_a_webhook_and_a_mailbox(tmp_path, clock):
    with http_receiver() as http, smtp_receiver() as smtp:
        box = outbox(tmp_path, clock, http.url, smtp.url)
        assert box.put(alert())
        assert box.deliver()[:2] == (2, 0)
        assert http.posted[0]["title"] == "A gate blocks the model of task_api"
        assert "8.5 points short" in http.posted[0]["message"]
        assert http.posted[0]["type"] == "failure"
        mail = smtp.mails[0]
        assert "A gate blocks the model of task_api" in mail["subject"]
        content = mail.get_body(("plain", "html"))
        assert content is not None
        assert "8.5 points short" in content.get_content()
        assert box.deliver()[:2] == (0, 0), "nobody gets it twice"
        assert len(http.posted) == 1


def test_text_of_models_is_data_in_a_mail(tmp_path, clock):
    with smtp_receiver() as smtp:
        box = outbox(tmp_path, clock, smtp.url)
        box.put(alert(facts=[("Answer", "<script>alert(1)</script> \x1b[2J \u202ereversed")]))
        box.deliver()
        content = {
            part.get_content_type(): part.get_content() for part in smtp.mails[0].walk() if not part.is_multipart()
        }
        assert "<script>" not in content.get("text/html", "")
        assert content
        for text in content.values():
            assert "\x1b" not in text
            assert "\u202e" not in text


def test_a_receiver_that_is_down_is_tried_again_until_it_takes_the_alert(tmp_path, clock):
    with http_receiver() as http:
        http.status = 500
        box = outbox(tmp_path, clock, http.url)
        box.put(alert())
        sent, waiting, faults = box.deliver()
        assert (sent, waiting) == (0, 1)
        assert http.tries == 3
        assert "json (address 1) does not take alerts" in faults[0]
        assert str(http.port) not in faults[0], "an address may hold a password"
        http.status = 200
        sent, waiting, faults = box.deliver()
        assert (sent, waiting) == (0, 1), "not at once"
        assert "tried again later" in faults[0]
        clock.now += 61
        # Another process, after a restart.
        assert outbox(tmp_path, clock, http.url).deliver() == (1, 0, ())
        assert len(http.posted) == 1


def test_an_address_without_a_scheme_is_named_by_its_place(tmp_path, clock):
    box = outbox(tmp_path, clock, "hooks.slack.com/services/T0123/B0123/hidden")
    box.put(alert())
    for _ in range(2):
        (fault,) = box.deliver().faults
        assert fault.startswith("address 1 d")
        assert "hidden" not in fault


def test_an_address_that_is_down_keeps_no_alert_from_the_others(tmp_path, clock):
    send = Recorded()
    send.down = {"slack://one"}
    box = outbox(tmp_path, clock, "slack://one", "json://two", send=send)
    box.put(alert())
    assert box.deliver()[:2] == (1, 1)
    send.down.clear()
    clock.now += 61
    assert box.deliver()[:2] == (1, 0)
    assert [url for url, *_ in send.taken] == ["json://two", "slack://one"]


def test_tries_become_rarer(tmp_path, clock):
    send = Recorded()
    send.down = {"json://one"}
    box = outbox(tmp_path, clock, "json://one", send=send)
    box.put(alert())
    asked = []
    for _ in range(4 * 60):
        before = send.tries
        box.deliver()
        asked.append(send.tries > before)
        clock.now += 60
    assert 5 <= sum(asked) <= 12


def test_the_same_fault_is_told_once_a_day_and_again_after_it_was_over(tmp_path, clock):
    send = Recorded()
    box = outbox(tmp_path, clock, "json://one", send=send)
    assert box.put(alert("endpoint"))
    assert not box.put(alert("endpoint"))
    assert box.put(alert("another"))
    clock.now += 25 * HOUR_S
    assert box.put(alert("endpoint"))
    assert not box.put(alert("endpoint"))
    assert box.over("endpoint")
    assert not box.over("endpoint")
    assert box.put(alert("endpoint"))


def test_more_than_an_address_may_get_goes_out_as_one_message(tmp_path, clock):
    send = Recorded()
    box = outbox(tmp_path, clock, "json://one", send=send, per_hour=3)
    for number in range(10):
        box.put(alert(str(number), title=f"fault {number}"))
    assert box.deliver()[:2] == (3, 0)
    assert [title for _, title, _ in send.taken] == ["fault 0", "fault 1", "8 alerts"]
    assert all(f"fault {number}" in send.taken[-1][2] for number in range(2, 10))
    box.put(alert("late", title="late"))
    assert box.deliver()[:2] == (0, 1)
    clock.now += HOUR_S
    assert box.deliver()[:2] == (1, 0)


def test_an_alert_that_nobody_takes_is_given_up_and_said(tmp_path, clock):
    send = Recorded()
    send.down = {"json://one"}
    box = outbox(tmp_path, clock, "json://one", send=send)
    box.put(alert())
    box.deliver()
    clock.now += 25 * HOUR_S
    sent, waiting, faults = box.deliver()
    assert (sent, waiting) == (0, 0)
    assert any("Given up after 24 h: 'A gate blocks the model of task_api'" in fault for fault in faults)


def test_an_address_that_apprise_does_not_know_is_said_without_giving_it_away(tmp_path, clock):
    box = outbox(tmp_path, clock, "pigeon://secret-loft")
    box.put(alert())
    faults = box.deliver().faults
    assert "no address that Apprise knows" in faults[0]
    assert "secret" not in faults[0]


def test_addresses_come_from_settings_and_from_a_secret_file(tmp_path, monkeypatch):
    file = tmp_path / "urls"
    file.write_text("# on call\nslack://a/b/c\n\njson://one\n")
    settings = AlertSettings(urls=("json://one",), urls_file=file)
    assert addresses(settings) == ["json://one", "slack://a/b/c"]
    assert "json://one" not in str(settings.model_dump(mode="json"))
    file.unlink()
    with pytest.raises(PlatformError, match=r"alerts\.urls_file .* cannot be read"):
        addresses(settings)


def test_without_an_address_nothing_piles_up(tmp_path, clock):
    box = outbox(tmp_path, clock)
    box.put(alert())
    assert box.deliver() == (0, 0, ())


def test_a_damaged_outbox_is_said(tmp_path, clock):
    box = outbox(tmp_path, clock, "json://one", send=Recorded())
    (tmp_path / "outbox.json").write_text("{")
    with pytest.raises(PlatformError, match=r"outbox\.json is damaged"):
        box.put(alert())


def test_links_and_the_present_champion(tmp_path, monkeypatch):
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path))
    monkeypatch.setenv("TASKAGENT_PROFILE", "smoke")
    settings = load_settings()
    assert run_link(settings, "abc") == "http://127.0.0.1:3230/runs/abc"
    assert what_serves(settings, "task_api") == "No model of task_api is served."
    monkeypatch.setenv("TASKAGENT_ALERTS__DAGSTER_URL", "https://dagster.example.org/")
    assert asset_link(load_settings(), "a", "b") == "https://dagster.example.org/assets/a/b"
