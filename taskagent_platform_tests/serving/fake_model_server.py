"""A stand-in for a vLLM server: the same record, process group and command line, and answers without a model.

``start_fake_server`` takes the place of ``start_server``.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from taskagent_platform.artifacts import read_manifest
from taskagent_platform.process_identity import boot_id, start_ticks
from taskagent_platform.serving.server import Server, free_port, server_command, write_server
from taskagent_platform.settings import Settings

_PROGRAM = Path(__file__).with_name("fake_model_server_process.py")
_START_TIMEOUT_S = 60


def start_fake_server(
    settings: Settings,
    model_folder: Path,
    *,
    name: str,
    log_file: Path,
    record_file: Path,
    on_progress: Callable[[str], None] | None = None,
    detached: bool = False,
) -> Server:
    """Starts a stand-in on a model folder, with a record as ``start_server`` writes it."""
    port = free_port()
    record_file.parent.mkdir(parents=True, exist_ok=True)
    command = server_command(settings, model_folder.resolve(), name=name, host="127.0.0.1", port=port)
    process = subprocess.Popen(
        [sys.executable, str(_PROGRAM), str(record_file), "--", *command], start_new_session=True
    )
    server = Server(
        name=name, pid=process.pid, create_time=start_ticks(process.pid), boot_id=boot_id(),
        host="127.0.0.1", port=port, base_url=f"http://127.0.0.1:{port}/v1",
        model_digest=read_manifest(model_folder).digest,
        model_folder=model_folder.resolve(), log_file=log_file.resolve(), record_file=record_file.resolve(),
        owner_pid=os.getpid(), owner_create_time=start_ticks(os.getpid()), started=datetime.now(UTC), cold_start_s=0.1,
        detached=detached,
    )  # fmt: skip
    write_server(server)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server
        except OSError:
            assert process.poll() is None, "the stand-in ended while starting"
            time.sleep(0.02)
    raise AssertionError("the stand-in did not answer")
