"""Alerts: what went wrong, told once, to every address of the settings, until each has it.

An alert is put into an outbox, a file that survives restarts, and delivered from there through Apprise, whose addresses
cover Slack, e-mail, Teams, PagerDuty, webhooks and many more. The same alert is not told twice within a day; an address
that does not take it is asked again, later and later; more alerts than an address may get in an hour go out as one
message. What cannot be delivered is said by :meth:`Outbox.deliver`.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import uuid4

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.errors import PlatformError
from taskagent_platform.serving.active import active_file, endpoint_url, read_active
from taskagent_platform.settings import AlertSettings, Settings

Severity = Literal["failure", "warning", "info"]
_LOOPBACK = "127.0.0.1"
_TRIES = 3
_PAUSE_S = 2.0
_FIRST_BACKOFF_S = 60.0
_LONGEST_BACKOFF_S = 3600.0
_HOUR_S = 3600.0
_VALUE_LENGTH = 2000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Alert(BaseModel):
    """One thing that somebody should know.

    Attributes:
        key: two alerts with the same key tell the same thing.
        title: what failed, in a line.
        severity: how bad it is.
        facts: names and values, in the order to be read; a value may hold text of users and models.
        at: when, in UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    title: str
    severity: Severity
    facts: tuple[tuple[str, str], ...] = ()
    at: datetime

    @classmethod
    def now(cls, key: str, title: str, severity: Severity, facts: Iterable[tuple[str, str | None]] = ()) -> "Alert":
        """Builds an alert of this moment; facts without a value are left out."""
        known = tuple((name, _harmless(value)) for name, value in facts if value)
        return cls(key=key, title=_harmless(title), severity=severity, facts=known, at=datetime.now(UTC))

    def text(self) -> str:
        """Returns its facts as plain text; each medium escapes it in its own way."""
        return "\n".join(f"{name}: {value}" for name, value in (*self.facts, ("When", f"{self.at:%Y-%m-%d %H:%M} UTC")))


class DeliveryError(Exception):
    """An address did not take a message; says why, without the address."""


Send = Callable[[str, str, str, Severity], None]
"""Sends title and text to an address, or raises DeliveryError."""


class Delivery(NamedTuple):
    """What one delivery came to.

    Attributes:
        sent: messages that were taken.
        waiting: alerts that some address has not got yet.
        faults: why, a sentence for each address that did not take one, or alert that was given up.
    """

    sent: int
    waiting: int
    faults: tuple[str, ...]


class _Waiting(BaseModel):
    alert: Alert
    id: str
    put_at: float
    delivered: list[str] = []


class _Address(BaseModel):
    sent_at: list[float] = []
    failures: int = 0
    next_try: float = 0.0
    fault: str = ""


class _State(BaseModel):
    waiting: list[_Waiting] = []
    told_at: dict[str, float] = {}
    addresses: dict[str, _Address] = {}


class Outbox:
    """The alerts that are on their way.

    Args:
        folder: where they are kept.
        settings: where they go, and how often.
        send: sends one message.
        clock: seconds since the epoch.
        sleep: waits between two tries.
    """

    def __init__(
        self,
        folder: Path,
        settings: AlertSettings,
        *,
        send: Send | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path = folder / "outbox.json"
        self._settings = settings
        self._send = send or send_with_apprise
        self._clock = clock
        self._sleep = sleep
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / "outbox.lock")
        # Apart from the state's: nobody who puts an alert waits for a slow address.
        self._delivering = FileLock(folder / "delivery.lock")

    def put(self, alert: Alert) -> bool:
        """Puts an alert into the outbox; returns False where the same was told not long ago."""
        now = self._clock()
        with self._lock:
            state = self._read()
            told = state.told_at.get(alert.key)
            repeat_after = self._settings.repeat_after_h * _HOUR_S
            if told is not None and now - told < repeat_after:
                return False
            state.told_at = {key: at for key, at in state.told_at.items() if now - at < repeat_after}
            state.told_at[alert.key] = now
            state.waiting.append(_Waiting(alert=alert, id=uuid4().hex, put_at=now))
            self._write(state)
        return True

    def over(self, key: str) -> bool:
        """Forgets that an alert was told, because its fault is over; returns whether it had been told."""
        with self._lock:
            state = self._read()
            told = state.told_at.pop(key, None) is not None
            if told:
                self._write(state)
        return told

    def deliver(self) -> Delivery:
        """Sends what is waiting to every address that has not got it yet.

        Raises:
            PlatformError: the file of addresses cannot be read, or the outbox is damaged.
        """
        urls = addresses(self._settings)
        try:
            with self._delivering.acquire(timeout=0):
                return self._deliver(urls)
        except Timeout:
            return Delivery(0, len(self._read().waiting), ())

    def _deliver(self, urls: list[str]) -> Delivery:
        sent, faults = 0, []
        for number, url in enumerate(urls, start=1):
            # What has no scheme is all address, and may hold a password.
            scheme, mark, _ = url.partition("://")
            name = f"{scheme} (address {number})" if mark else f"address {number}"
            done, fault = self._deliver_to(url, name)
            sent += done
            if fault:
                faults.append(fault)
        with self._lock:
            state = self._read()
            known = {_address_id(url) for url in urls}
            state.waiting = [entry for entry in state.waiting if not known <= set(entry.delivered)]
            kept = []
            for entry in state.waiting:
                if self._clock() - entry.put_at > self._settings.give_up_after_h * _HOUR_S:
                    faults.append(f"Given up after {self._settings.give_up_after_h:g} h: {entry.alert.title!r}.")
                else:
                    kept.append(entry)
            state.waiting = kept
            state.addresses = {key: value for key, value in state.addresses.items() if key in known}
            self._write(state)
        return Delivery(sent, len(kept), tuple(faults))

    def _deliver_to(self, url: str, name: str) -> tuple[int, str | None]:
        """Sends to one address; returns how many messages it took, and why not more."""
        key = _address_id(url)
        state = self._read()
        address = state.addresses.get(key, _Address())
        due = [entry for entry in state.waiting if key not in entry.delivered]
        if not due:
            return 0, None
        if self._clock() < address.next_try:
            return 0, f"{name} did not take {len(due)} alerts ({address.fault}); it is tried again later."
        sent = 0
        for group in self._groups(due, address):
            title, text, severity = _message(group)
            fault = self._try(url, title, text, severity)
            self._note(key, group, fault)
            if fault is not None:
                return sent, f"{name} does not take alerts: {fault} {len(due) - sent} of them wait."
            sent += 1
        return sent, None

    def _groups(self, due: list[_Waiting], address: _Address) -> list[list[_Waiting]]:
        """Returns what goes out as one message each: the last one holds all that is over the limit."""
        recent = [at for at in address.sent_at if self._clock() - at < _HOUR_S]
        allowed = self._settings.per_hour - len(recent)
        if allowed <= 0:
            return []
        if len(due) <= allowed:
            return [[entry] for entry in due]
        return [*([entry] for entry in due[: allowed - 1]), due[allowed - 1 :]]

    def _try(self, url: str, title: str, text: str, severity: Severity) -> str | None:
        fault = ""
        for attempt in range(_TRIES):
            if attempt:
                self._sleep(_PAUSE_S**attempt)
            try:
                self._send(url, title, text, severity)
                return None
            except DeliveryError as error:
                fault = str(error)
        return fault

    def _note(self, key: str, group: list[_Waiting], fault: str | None) -> None:
        now = self._clock()
        with self._lock:
            state = self._read()
            address = state.addresses.setdefault(key, _Address())
            if fault is None:
                ids = {entry.id for entry in group}
                for entry in state.waiting:
                    if entry.id in ids:
                        entry.delivered.append(key)
                address.sent_at = [*(at for at in address.sent_at if now - at < _HOUR_S), now]
                address.failures, address.next_try, address.fault = 0, 0.0, ""
            else:
                address.next_try = now + min(_FIRST_BACKOFF_S * 2**address.failures, _LONGEST_BACKOFF_S)
                address.failures += 1
                address.fault = fault
            self._write(state)

    def _read(self) -> _State:
        try:
            return _State.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _State()
        except ValidationError as error:
            raise PlatformError(f"{self._path} is damaged ({error}); delete it, the alerts in it are lost.") from error

    def _write(self, state: _State) -> None:
        scratch = self._path.with_name(self._path.name + ".partial")
        scratch.write_text(state.model_dump_json())
        scratch.replace(self._path)


def outbox(settings: Settings) -> Outbox:
    """Returns the profile's outbox."""
    return Outbox(settings.home / settings.profile / "alerts", settings.alerts)


def addresses(settings: AlertSettings) -> list[str]:
    """Returns every address of the settings, each once. Raises PlatformError where their file cannot be read."""
    found = [url.get_secret_value() for url in settings.urls]
    if settings.urls_file is not None:
        try:
            lines = settings.urls_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PlatformError(f"alerts.urls_file {settings.urls_file} cannot be read: {error}.") from error
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return list(dict.fromkeys(found))


def send_with_apprise(url: str, title: str, text: str, severity: Severity) -> None:
    """Sends a message to one address of Apprise.

    Raises:
        DeliveryError: Apprise does not know such an address, or it did not take the message.
    """
    import apprise

    target = apprise.Apprise.instantiate(url, suppress_exceptions=True)
    if target is None:
        raise DeliveryError("this is no address that Apprise knows; look at alerts.urls.")
    kind = apprise.NotifyType(severity)
    # Every medium is told that this is plain text and escapes it in its own way.
    with apprise.LogCapture(level=apprise.logging.WARNING, fmt="%(message)s") as log:
        taken = target.notify(body=text, title=title, notify_type=kind, body_format=apprise.NotifyFormat.TEXT)
        said = " ".join(log.getvalue().split())
    if not taken:
        raise DeliveryError(said.replace(url, "the address")[:300] or "it gave no reason.")


def what_serves(settings: Settings, domain: str) -> str:
    """Returns which model of a domain clients get now, in a sentence."""
    present = read_active(active_file(settings)).domains.get(domain)
    if present is None:
        return f"No model of {domain} is served."
    active = present.active
    return (
        f"Model {active.model_digest[:12]}, deployed {active.deployed_at:%Y-%m-%d %H:%M} UTC, is what "
        f"{endpoint_url(settings)} serves."
    )


def run_link(settings: Settings, run_id: str) -> str:
    """Returns the address of a run's page."""
    return f"{_page(settings)}/runs/{run_id}"


def asset_link(settings: Settings, *key: str) -> str:
    """Returns the address of an asset's page."""
    return f"{_page(settings)}/assets/{'/'.join(key)}"


def _page(settings: Settings) -> str:
    return (settings.alerts.dagster_url or f"http://{_LOOPBACK}:{settings.ports.dagster}").rstrip("/")


def _message(group: list[_Waiting]) -> tuple[str, str, Severity]:
    alerts = [entry.alert for entry in group]
    if len(alerts) == 1:
        return alerts[0].title, alerts[0].text(), alerts[0].severity
    worst: Severity = "failure" if any(alert.severity == "failure" for alert in alerts) else "warning"
    text = "\n\n".join(f"{alert.title}\n{alert.text()}" for alert in alerts)
    return f"{len(alerts)} alerts", text, worst


def _harmless(text: str) -> str:
    """Takes out what could hide or reorder text, and shortens what is too long to be read."""
    clean = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return clean if len(clean) <= _VALUE_LENGTH else clean[: _VALUE_LENGTH - 1] + "…"


def _address_id(url: str) -> str:
    """Names an address in the outbox without giving it away."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]
