"""What a worker and its launcher tell each other through files; light, because a supervisor stays beside every run."""

import json
from pathlib import Path

RECORD = "worker.json"
"""The worker's record, and its lease, while it runs."""
STOP = "stop"
"""Tells the worker to end its run."""
EXIT = "exit.json"
"""How the worker ended."""


def write_ending(folder: Path, code: int, asked: bool) -> None:
    """Writes how a worker ended, then gives its lease back."""
    scratch = folder / f"{EXIT}.partial"
    scratch.write_text(json.dumps({"code": code, "asked": asked}))
    scratch.replace(folder / EXIT)
    (folder / RECORD).unlink(missing_ok=True)
