"""The audit log: what agents called and what operators overrode, as JSON lines that cannot be changed unnoticed.

Every line carries the sha256 of the line before it, and a small head file beside the log remembers how many lines
there are and the sha256 of the last one: a changed, removed, inserted or cut-off line shows in :meth:`AuditLog.verify`.
Somebody who may write both files can forge both; hand the head's hash to another machine where that matters.
"""

import hashlib
import json
import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.errors import PlatformError
from taskagent_platform.settings import Settings

Outcome = Literal["approved", "refused", "executed", "failed"]
_NO_PREVIOUS = "0" * 64
_BLOCK_BYTES = 1 << 16


class AuditEntry(BaseModel):
    """One line of the log.

    Attributes:
        time: when, in UTC.
        actor: who: the account that the process ran under, or the name that the caller gave.
        action: ``tool_call``, ``deploy``, ``gate_override``, ``rollback``, ``serve``.
        outcome: an approved call is followed by its execution, as a line of its own.
        domain: the domain that it concerns.
        model_digest: the model that made the call, or was deployed; None where it is not known.
        tool: the tool called.
        arguments: its arguments: an object, or the text as the model wrote it where that is no object.
        reason: why it was refused, failed or overridden.
        previous: sha256 of the line before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: datetime
    actor: str
    action: str
    outcome: Outcome
    domain: str | None = None
    model_digest: str | None = None
    tool: str | None = None
    arguments: dict[str, Any] | str | None = None
    reason: str | None = None
    previous: str


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lines: int
    last: str


class AuditLog:
    """An append-only log in one file; several processes may append to it.

    Args:
        path: the log; ``<path>.head`` and ``<path>.lock`` lie beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head_path = path.with_name(path.name + ".head")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(path.name + ".lock"))

    def lock(self) -> AbstractContextManager[Any]:
        """Returns the lock that appending takes: hold it to look and then append without a gap."""
        return self._lock

    def check(self) -> None:
        """Tries whether a line can be appended, so that it shows before something is done.

        Raises:
            PlatformError: the log was changed by someone else, or it or its folder cannot be written.
        """
        with self._writing(), self._lock:
            self._tail()
            os.close(self._open())
            scratch = self._head_scratch()
            scratch.write_text(_NO_PREVIOUS)
            scratch.unlink()

    def append(
        self,
        action: str,
        outcome: Outcome,
        *,
        domain: str | None = None,
        model_digest: str | None = None,
        tool: str | None = None,
        arguments: Mapping[str, Any] | str | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> AuditEntry:
        """Appends a line; it is on the disk when this returns.

        Raises:
            PlatformError: the log was changed by someone else; nothing is appended, so that the evidence stays. Or it
                cannot be written.
        """
        with self._writing(), self._lock:
            created = not self._head_path.exists()
            previous, lines = self._tail()
            entry = AuditEntry(
                time=datetime.now(UTC),
                actor=actor or account(),
                action=action,
                outcome=outcome,
                domain=domain,
                model_digest=model_digest,
                tool=tool,
                arguments=dict(arguments) if isinstance(arguments, Mapping) else arguments,
                reason=reason,
                previous=previous,
            )
            line = entry.model_dump_json(exclude_none=True).encode()
            with os.fdopen(self._open(), "ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._write_head(_Head(lines=lines + 1, last=_sha256(line)))
            if created:
                _sync_folder(self.path.parent)
            return entry

    def entries(self) -> Iterator[AuditEntry]:
        """Yields the entries from the oldest to the newest. Raises PlatformError for a damaged line."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield self._parse(line, number)

    def recent(self, window: timedelta) -> list[AuditEntry]:
        """Returns the entries of the last ``window``, newest first.

        Raises:
            PlatformError: the log was changed by someone else.
        """
        since = datetime.now(UTC) - window
        found: list[AuditEntry] = []
        with self._lock:
            # Else a line that a power cut left half-written would be in the way until something is appended.
            self._tail()
            for line in _lines_backwards(self.path):
                entry = self._parse(line, None)
                if entry.time < since:
                    break
                found.append(entry)
        return found

    def verify(self) -> int:
        """Checks the whole chain and returns the number of lines.

        Raises:
            PlatformError: names the first line that does not fit, or the last one where it is unfinished.
        """
        with self._lock:
            number = self._verify()[0]
            last = next(_lines_backwards(self.path), None)
        if last is not None and not last.endswith(b"\n"):
            raise PlatformError(
                f"{self.path} was cut off in the middle of line {number + 1}, as a crash does: the {number} lines "
                "before it are whole and unchanged. The next call or deployment takes the rest of that line away."
            )
        return number

    def _verify(self) -> tuple[int, str]:
        """Returns the number of whole lines and the hash of the last of them; an unfinished last line is left aside."""
        head = self._read_head()
        written = 0 if head is None else head.lines
        previous, number = _NO_PREVIOUS, 0
        if self.path.exists():
            with self.path.open("rb") as file:
                lines = (line for line in file if line.endswith(b"\n"))
                for number, line in enumerate(lines, start=1):
                    entry = self._parse(line, number)
                    if entry.previous != previous:
                        raise PlatformError(
                            f"{self.path} was changed: line {number} does not follow from the line before it."
                        )
                    previous = _sha256(line.rstrip(b"\n"))
                    if head is not None and number == head.lines and previous != head.last:
                        raise PlatformError(f"{self.path} was changed: line {number} is not the one that was written.")
        # A crash leaves one line at most that the head does not know of yet.
        if head is None and number > 1:
            raise PlatformError(f"{self._head_path} is missing, so nobody can tell whether {self.path} is whole.")
        if number > written + 1:
            raise PlatformError(f"{self.path} was changed: it had {written} lines and has {number}.")
        if number < written:
            raise PlatformError(
                f"{self.path} was cut off at line {number + 1}: it had {written} lines and has {number}."
            )
        return number, previous

    def _tail(self) -> tuple[str, int]:
        """Returns the hash of the last line and the number of lines, after mending what a power cut leaves."""
        head = self._read_head()
        last = next(_lines_backwards(self.path), None)
        if head is None and last is None:
            return _NO_PREVIOUS, 0
        if head is not None and last is not None and last.endswith(b"\n") and _sha256(last[:-1]) == head.last:
            return head.last, head.lines
        try:
            lines, previous = self._verify()
        except PlatformError as error:
            raise PlatformError(
                f"{error} Nothing is executed without an audit log: keep {self.path} and its .head as evidence, "
                "move both away and try again."
            ) from error
        if last is not None and not last.endswith(b"\n"):
            # It was being written when the machine stopped; its caller was never told that it counts.
            os.truncate(self.path, self.path.stat().st_size - len(last))
        if lines and (head is None or head.lines < lines):
            # Before another line follows: two that the head does not know of are taken for somebody else's.
            self._write_head(_Head(lines=lines, last=previous))
        return previous, lines

    def _read_head(self) -> _Head | None:
        try:
            return _Head.model_validate_json(self._head_path.read_text())
        except FileNotFoundError:
            return None
        except (ValidationError, UnicodeDecodeError) as error:
            raise PlatformError(f"{self._head_path} is damaged.") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PlatformError(
                f"{self.path} cannot be written ({error}), and nothing is executed without an audit log: let this "
                "account write it and its folder, or free some space, and try again."
            ) from error

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _head_scratch(self) -> Path:
        return self._head_path.with_name(self._head_path.name + ".partial")

    def _write_head(self, head: _Head) -> None:
        scratch = self._head_scratch()
        with scratch.open("w") as file:
            file.write(head.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._head_path)

    def _parse(self, line: bytes, number: int | None) -> AuditEntry:
        where = "its last lines" if number is None else f"line {number}"
        try:
            if not line.endswith(b"\n"):
                raise PlatformError(
                    f"{self.path} was cut off in the middle of a line ({where}): `taskagent audit verify` says whether "
                    "a crash did it, after which the next call or deployment takes the rest of that line away."
                )
            return AuditEntry.model_validate(json.loads(line))
        except (ValueError, ValidationError) as error:
            raise PlatformError(f"{self.path} was changed: {where} is no audit entry.") from error


def audit_log(settings: Settings) -> AuditLog:
    """Returns the audit log of a profile."""
    return AuditLog(settings.home / settings.profile / "audit.jsonl")


def account() -> str:
    """Returns the name of the account whose rights this process has, whatever the environment calls it."""
    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container may run under a number that has no name
        return f"uid {uid}"


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Yields a file's lines from the last to the first, with their line ends."""
    if not path.exists():
        return
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        rest = b""
        while start > 0:
            size = min(_BLOCK_BYTES, start)
            start -= size
            file.seek(start)
            first, *lines = (file.read(size) + rest).splitlines(keepends=True)
            yield from reversed(lines)
            rest = first
        if rest:
            yield rest
