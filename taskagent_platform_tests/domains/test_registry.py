import sys
from pathlib import Path

import pytest

from taskagent_platform.domains.registry import domains, find_domain
from taskagent_platform.errors import PlatformError

MODULE = """
from taskagent_platform.domains.base import Domain

class Weather(Domain):
    name = "weather"
    tools = ()
    agent_name = "Weather"
    agent_requests = ()
    sources = suites = development_suites = ()

    def system_prompt(self, now): return ""
    def backend(self, now, fixture="default"): raise NotImplementedError
    def generate(self, source, count, seed): return iter(())

WEATHER = Weather()
NUMBER = 7
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package `weather_domains` with the given entry points, as pip would lay it out."""
    (tmp_path / "weather_domains.py").write_text(MODULE)
    (tmp_path / "broken_domains.py").write_text("raise KeyError('HOME_OF_THE_WEATHER')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "weather_domains", raising=False)

    def write(*lines: str, package: str = "weather-domains") -> None:
        folder = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("\n".join(["[taskagent.domains]", *lines]))

    return write


def test_the_domains_of_other_packages_are_found(install) -> None:
    install("weather = weather_domains:WEATHER")
    assert find_domain("weather").agent_name == "Weather"
    assert {"task_api", "weather"} <= set(domains())


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(PlatformError, match=r"There is no domain 'tasks'; there are: .*task_api"):
        find_domain("tasks")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("weather = weather_domains:RAIN", "cannot be loaded: .*RAIN"),
        ("weather = no_such_module:WEATHER", "cannot be loaded: .*no_such_module"),
        ("weather = broken_domains:WEATHER", "cannot be loaded: KeyError: 'HOME_OF_THE_WEATHER'"),
        ("weather = weather_domains:NUMBER", "is a int, not a Domain object"),
        ("storm = weather_domains:WEATHER", "calls itself 'weather'"),
    ],
)
def test_a_broken_domain_is_named_with_its_package(install, line: str, complaint: str) -> None:
    install(line)
    name = line.split()[0]
    with pytest.raises(PlatformError, match=rf"The domain '{name}' of the package weather-domains .*{complaint}"):
        find_domain(name)
    with pytest.raises(PlatformError, match=complaint):
        domains()
    assert find_domain("task_api").name == "task_api"


def test_two_packages_with_one_name_are_refused(install) -> None:
    install("weather = weather_domains:WEATHER")
    install("weather = elsewhere:WEATHER", package="other-weather")
    with pytest.raises(PlatformError, match=r"Two packages offer a domain 'weather': .*weather"):
        find_domain("task_api")
