"""A server of no model, with children that ignore SIGTERM."""

import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
SEEN_S = 0.5  # long enough to be seen with all children before it ends
child = subprocess.Popen([sys.executable, "-c", STUBBORN])
daemon = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)
with open(os.environ["FAKE_PIDS"], "w") as file:
    print(os.getpid(), child.pid, daemon.pid, file=file)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/crash":
            os._exit(1)


port = int(sys.argv[sys.argv.index("--port") + 1])
if "--never-healthy" in sys.argv:
    time.sleep(600)
if "--fail" in sys.argv:
    time.sleep(SEEN_S)
    print("\n".join(f"line {i}" for i in range(100)))
    sys.exit(3)
try:
    server = HTTPServer(("127.0.0.1", port), Handler)
except OSError:
    time.sleep(SEEN_S)
    raise
server.serve_forever()
