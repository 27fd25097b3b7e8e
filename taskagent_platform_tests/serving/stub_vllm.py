"""A process that behaves like vLLM at its start, in the way named by its first argument.

Run by test_server.py as ``python stub_vllm.py MODE PORT NAME MODEL_FOLDER``.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import time

mode, port, name, folder = sys.argv[1:5]

if mode == "bad_model":
    print("(EngineCore pid=7) INFO 11-22 16:40:08 [core.py:1] loading")
    print("(EngineCore pid=7) ERROR 11-22 16:40:09 [core.py:9] Traceback (most recent call last):")
    print("(EngineCore pid=7) ERROR 11-22 16:40:09 [core.py:9] ValueError: the weights of layer 3 do not fit")
    print("RuntimeError: Engine core initialization failed. See root cause above.")
    sys.exit(1)
if mode == "silent":
    sys.exit(3)
if mode == "killed":
    print("ERROR 11-22 16:40:09 [core.py:9] ValueError: of no consequence", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "vllm-worker"])
if mode == "hang":
    time.sleep(600)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
served = "someone-else" if mode == "imposter" else name


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": served, "root": folder}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


print("WORKER", worker.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
