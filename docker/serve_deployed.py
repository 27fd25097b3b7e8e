"""Serves the deployed model with a plain vLLM, and ends when something else is deployed, to be started again with that.

Runs inside vLLM's own image, which has none of the platform's code: only what the deployment wrote down is read, and
the model's files must have the digests that it names, so that nothing is served which was not deployed, and nothing
otherwise than the platform serves it.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 5.0
_SERVED = ("model_digest", "model_folder", "server_options")


def deployed(path: Path, domain: str) -> dict[str, Any] | None:
    """Returns the active deployment of a domain, or None while there is none."""
    try:
        domains = json.loads(path.read_text())["domains"]
    except FileNotFoundError:
        return None
    found: dict[str, Any] | None = domains[domain]["active"] if domain in domains else None
    return found


def fault(deployment: dict[str, Any]) -> str | None:
    """Returns why a deployment cannot be served as it was judged; None if it can."""
    if not deployment.get("server_options"):
        return "The deployment does not say how its model is served: `taskagent serve` writes it down."
    folder = Path(deployment["model_folder"])
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        named = {"kind": manifest["kind"], "files": manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"The manifest of {folder} cannot be read ({error!r}): deploy the model again."
    # The digest of a manifest, as taskagent_platform/artifacts.py makes it.
    text = json.dumps(named, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != deployment["model_digest"]:
        return f"{folder} does not hold model {deployment['model_digest'][:12]}: deploy that model again."
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del present["manifest.json"]
    changed = set(present) ^ set(named["files"])
    changed |= {name for name in set(present) - changed if _sha256(present[name]) != named["files"][name]}
    if changed:
        return f"{folder} does not match its manifest ({', '.join(sorted(changed))}): deploy the model again."
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command(deployment: dict[str, Any], port: int) -> list[str]:
    """Returns the server's command line: what the model was judged with, on a card of its own."""
    folder = deployment["model_folder"]
    options = list(deployment["server_options"])
    if "--gpu-memory-utilization" in options:
        share = options.index("--gpu-memory-utilization")
        del options[share : share + 2]
    return [
        "python3", "-m", "vllm.entrypoints.openai.api_server", "--model", folder,
        "--chat-template", f"{folder}/chat_template.jinja", "--host", "0.0.0.0", "--port", str(port), *options,
    ]  # fmt: skip


def main(path: Path, domain: str, port: int) -> int:
    """Serves until the server ends or something else is deployed; returns the exit status."""
    while (deployment := deployed(path, domain)) is None:
        print(f"Nothing of {domain} is deployed yet ({path}).", flush=True)
        time.sleep(POLL_S)
    if (wrong := fault(deployment)) is not None:
        print(wrong, flush=True)
        return 1
    server = subprocess.Popen(command(deployment, port))
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    while server.poll() is None:
        time.sleep(POLL_S)
        present = deployed(path, domain)
        if present is not None and any(present.get(name) != deployment[name] for name in _SERVED):
            print("Something else was deployed; this server ends.", flush=True)
            server.terminate()
            server.wait()
            return 0
    return server.returncode


if __name__ == "__main__":
    sys.exit(main(Path(os.environ["ACTIVE_FILE"]), os.environ["DOMAIN"], int(os.environ["PORT"])))
