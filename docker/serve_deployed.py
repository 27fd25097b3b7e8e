"""Serves the deployed model with a plain vLLM, and ends when another one is deployed, to be started again with that.

Runs inside vLLM's own image, which has none of the platform's code: only what the deployment wrote down is read, so
that nothing is served which did not pass its gates.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 5.0


def deployed(path: Path, domain: str) -> dict[str, Any] | None:
    """Returns the active deployment of a domain, or None while there is none."""
    try:
        domains = json.loads(path.read_text())["domains"]
    except FileNotFoundError:
        return None
    found: dict[str, Any] | None = domains[domain]["active"] if domain in domains else None
    return found


def command(deployment: dict[str, Any], port: int) -> list[str]:
    """Returns the server's command line: what the gpu profile's models are judged with, on a card of its own."""
    folder = deployment["model_folder"]
    return [
        "python3", "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
        "--served-model-name", deployment["model_name"], "--host", "0.0.0.0", "--port", str(port),
        "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32", "--seed", "42",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--chat-template", f"{folder}/chat_template.jinja",
        "--enable-prefix-caching", "--disable-uvicorn-access-log",
    ]  # fmt: skip


def main(path: Path, domain: str, port: int) -> int:
    """Serves until the server ends or another model is deployed; returns the exit status."""
    while (deployment := deployed(path, domain)) is None:
        print(f"Nothing of {domain} is deployed yet ({path}).", flush=True)
        time.sleep(POLL_S)
    server = subprocess.Popen(command(deployment, port))
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    while server.poll() is None:
        time.sleep(POLL_S)
        present = deployed(path, domain)
        if present is not None and present["model_digest"] != deployment["model_digest"]:
            print("Another model was deployed; this server ends.", flush=True)
            server.terminate()
            server.wait()
            return 0
    return server.returncode


if __name__ == "__main__":
    sys.exit(main(Path(os.environ["ACTIVE_FILE"]), os.environ["DOMAIN"], int(os.environ["PORT"])))
