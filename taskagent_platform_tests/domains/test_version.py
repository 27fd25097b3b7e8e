"""What makes something that was made from a domain out of date, for a domain of a package of somebody else's."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.artifacts import new_artifact
from taskagent_platform.data.source import make_source
from taskagent_platform.data.targeted import KIND as TARGETED
from taskagent_platform.data.targeted import usable_targeted
from taskagent_platform.domains.version import domain_version, version_with
from taskagent_platform.serving.gates import report_code_version
from taskagent_platform.settings import load_settings

SOURCE = """
from pathlib import Path
from taskagent_platform.domains.base import Example
from taskagent_platform_tests.light_domain import LightDomain

PHRASINGS = Path(__file__).with_name("phrasings.txt")

class Lamps(LightDomain):
    name = "lamps"
    sources = ("structured_outputs",)

    def generate(self, source, count, seed, moments):
        for number in range(count):
            asked = {"role": "user", "content": f"{PHRASINGS.read_text()} {number}"}
            said = {"role": "assistant", "content": "Done."}
            meta = {"source": source, "now": moments[0].isoformat(), "state": self.backend(moments[0]).snapshot()}
            yield Example([asked, said], meta)

DOMAIN = Lamps()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site" / "lamps_of_somebody"
    (folder / "words").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "domain.py").write_text(SOURCE)
    (folder / "phrasings.txt").write_text("light")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("TASKAGENT_HOME", str(tmp_path / "home"))
    for name in (folder.name, f"{folder.name}.domain"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def lamps(package: Path) -> Any:
    return importlib.import_module(f"{package.name}.domain").DOMAIN


def versions(domain: Any) -> tuple[str, ...]:
    return domain_version(domain), version_with(domain, "data"), report_code_version(domain)


@pytest.mark.parametrize("file", ["domain.py", "tools.py", "words/rooms.txt"])
def test_every_file_of_the_domains_package_counts(package: Path, file: str) -> None:
    domain = lamps(package)
    before = versions(domain)
    cache = package / "__pycache__" / "domain.cpython-311.pyc"
    cache.parent.mkdir(exist_ok=True)
    cache.write_bytes(b"compiled")
    version_with.cache_clear()
    assert versions(domain) == before
    with (package / file).open("a") as changed:
        changed.write("# more\n")
    assert versions(domain)[1:] == before[1:], "what is edited while a process works concerns the next one"
    version_with.cache_clear()
    assert all(old != new for old, new in zip(before, versions(domain), strict=True))


def test_a_module_of_no_package_is_all_that_its_domain_is(package: Path) -> None:
    (package / "__init__.py").unlink()
    domain = lamps(package)
    before = domain_version(domain)
    (package / "phrasings.txt").write_text("of another module")
    assert domain_version(domain) == before
    with (package / "domain.py").open("a") as changed:
        changed.write("# more\n")
    assert domain_version(domain) != before


def test_a_changed_phrasing_makes_the_data_anew(package: Path, tmp_path: Path) -> None:
    domain, settings = lamps(package), load_settings(profile="smoke", data={"structured_outputs": 3})
    folder = tmp_path / "structured_outputs"
    first, reused = make_source(settings, domain, "structured_outputs", folder)
    assert not reused
    assert make_source(settings, domain, "structured_outputs", folder) == (first, True)
    (package / "phrasings.txt").write_text("switch")
    version_with.cache_clear()
    second, reused = make_source(settings, domain, "structured_outputs", folder)
    assert not reused
    assert second.digest != first.digest


def test_targeted_examples_of_other_phrasings_are_not_used(package: Path, tmp_path: Path) -> None:
    domain, folder = lamps(package), tmp_path / TARGETED
    version = version_with(domain, "data", "domains")
    with new_artifact(folder, kind=TARGETED, inputs={}, settings={}, code_version=version):
        pass
    assert usable_targeted(folder, domain)
    (package / "phrasings.txt").write_text("switch")
    version_with.cache_clear()
    assert not usable_targeted(folder, domain)
