"""Artifacts: folders that count as finished only once their manifest is there.

A stage writes into a scratch folder beside the target and calls :func:`publish` by leaving the
:func:`new_artifact` context; the manifest is written last and the folder is renamed into place. A folder
without a manifest, or whose files no longer match it, is never taken for a finished artifact.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from taskagent_platform.errors import PlatformError

MANIFEST_NAME = "manifest.json"
_CHUNK_BYTES = 1 << 20


class Manifest(BaseModel):
    """What an artifact is, what it holds and what it was made from.

    Attributes:
        kind: the stage that made it, for example ``merged_model``.
        files: sha256 of every file, by its path relative to the folder.
        inputs: digests of the artifacts and data it was made from, by name.
        code_version: digest of the platform's own source files.
        settings: the settings that the stage used.
        details: figures that the stage wants to hand on, for example its final loss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    files: dict[str, str]
    inputs: dict[str, str]
    code_version: str
    settings: dict[str, Any]
    details: dict[str, Any] = {}

    @property
    def digest(self) -> str:
        """The artifact's identity: sha256 over its kind and the sha256 of every file."""
        return digest_of({"kind": self.kind, "files": self.files})


def digest_of(value: Any) -> str:
    """Returns the sha256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


@cache
def code_version(*parts: str) -> str:
    """Returns a digest of the package's source files.

    Args:
        parts: sub-packages (``"data"``, ``"domains/task_api"``) to look at; all of the package if none is given.
    """
    root = Path(__file__).parent
    folders = [root / part for part in parts] or [root]
    sha = hashlib.sha256()
    for folder in folders:
        paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
        for path in paths:
            if path.is_file() and "__pycache__" not in path.parts:
                sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()


@cache
def git_commit() -> str | None:
    """Returns the commit that the code was taken from, or None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def new_artifact(
    folder: Path,
    *,
    kind: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    code_version: str,
    details: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Yields an empty scratch folder and turns it into the artifact ``folder`` when the block succeeds.

    ``details`` may be filled inside the block. If the block raises, the scratch folder is removed and what
    stood at ``folder`` before stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.parent / f".{folder.name}.{uuid4().hex[:8]}.partial"
    scratch.mkdir()
    try:
        yield scratch
        files = {
            path.relative_to(scratch).as_posix(): file_digest(path)
            for path in sorted(scratch.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            kind=kind,
            files=files,
            inputs=dict(inputs),
            code_version=code_version,
            settings=dict(settings),
            details=details or {},
        )
        _write_durably(scratch / MANIFEST_NAME, manifest.model_dump_json(indent=2))
        _replace_folder(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_manifest(folder: Path, *, kind: str | None = None, verify: bool = False) -> Manifest:
    """Reads the manifest of an artifact.

    Args:
        folder: the artifact.
        kind: refuse another kind of artifact.
        verify: also compare the sha256 of every file, and refuse missing and extra files.

    Raises:
        PlatformError: there is no manifest, it is damaged, or the folder does not match it.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise PlatformError(f"{folder} is not a finished artifact (no {MANIFEST_NAME}); make it again.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise PlatformError(f"{path} is damaged: {error}. Delete the folder and make it again.") from error
    if kind is not None and manifest.kind != kind:
        raise PlatformError(f"{folder} holds a {manifest.kind}, not a {kind}.")
    if verify:
        present = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        del present[MANIFEST_NAME]
        if odd := set(present) ^ set(manifest.files):
            raise PlatformError(f"{folder} does not match its manifest: {sorted(odd)[0]} is missing or extra.")
        for name, expected in manifest.files.items():
            if file_digest(present[name]) != expected:
                raise PlatformError(f"{folder} does not match its manifest: {name} was changed after it was made.")
    return manifest


def find_artifact(
    folder: Path, *, kind: str, inputs: Mapping[str, str], settings: Mapping[str, Any], code_version: str
) -> Manifest | None:
    """Returns the manifest of ``folder`` if it was made from exactly this, unchanged, else None."""
    try:
        manifest = read_manifest(folder, kind=kind, verify=True)
    except PlatformError:
        return None
    wanted = (dict(inputs), json.loads(json.dumps(dict(settings))), code_version)
    return manifest if (manifest.inputs, manifest.settings, manifest.code_version) == wanted else None


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _replace_folder(scratch: Path, folder: Path) -> None:
    """Renames ``scratch`` to ``folder``; an older folder there is moved aside first and then removed."""
    if folder.exists():
        old = folder.parent / f".{folder.name}.{uuid4().hex[:8]}.old"
        folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old)
    else:
        scratch.rename(folder)
