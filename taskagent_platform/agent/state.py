"""A simulated backend whose state outlives the process: one JSON file, changed by one process at a time."""

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from taskagent_platform.domains.base import Backend, Domain
from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings


class StoredBackend(Backend):
    """A domain's backend whose state lies in a file.

    Every call reads the file, executes and writes it again by rename, under a lock: a process that dies leaves the
    state before or after a call, never in between.

    Args:
        domain: the domain whose backend executes.
        path: the file; it starts with ``fixture`` where it is missing.
        now: the clock; None takes the time of each call.
        fixture: the named fixture that a new file starts with.
    """

    def __init__(self, domain: Domain, path: Path, now: datetime | None = None, fixture: str = "default") -> None:
        self._domain = domain
        self._path = path
        self._now = now
        self._fixture = fixture
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(path.name + ".lock"))

    def reset(self, fixture: str = "default") -> None:
        """Puts the state back to a named fixture. Raises KeyError for an unknown name."""
        with self._lock:
            self._write(self._domain.backend(self._clock(), fixture).snapshot())

    def load(self, state: dict[str, Any]) -> None:
        """Takes over a state as :meth:`snapshot` returns it."""
        with self._lock:
            self._write(state)

    def execute(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Executes one call and stores what it changed.

        Raises:
            ToolError: the service refuses the call; the state is unchanged.
            PlatformError: the file is damaged.
        """
        with self._lock:
            backend = self._read()
            before = backend.snapshot()
            result = backend.execute(tool, arguments)
            after = backend.snapshot()
            if after != before:
                self._write(after)
            return result

    def snapshot(self) -> dict[str, Any]:
        """Returns the whole state. Raises PlatformError where the file is damaged."""
        with self._lock:
            return self._read().snapshot()

    def _clock(self) -> datetime:
        return self._now or datetime.now().replace(second=0, microsecond=0)

    def _read(self) -> Backend:
        backend = self._domain.backend(self._clock(), self._fixture)
        try:
            stored = json.loads(self._path.read_text())
            if stored["domain"] != self._domain.name:
                raise PlatformError(f"{self._path} holds the state of {stored['domain']}, not of {self._domain.name}.")
            backend.load(stored["state"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlatformError(
                f"{self._path} is damaged ({error}); delete it to start again from the {self._fixture} fixture."
            ) from error
        return backend

    def _write(self, state: Mapping[str, Any]) -> None:
        scratch = self._path.with_name(self._path.name + ".partial")
        with scratch.open("w") as file:
            json.dump({"domain": self._domain.name, "state": state}, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._path)


def stored_backend(settings: Settings, domain: Domain, now: datetime | None = None) -> StoredBackend:
    """Returns the backend that ``taskagent ask`` and the service of a domain share."""
    return StoredBackend(domain, settings.folder(domain.name) / "state.json", now)
