"""A server of ``/generate`` without a model: each token takes ``TOKEN_S``."""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN_S = 0.02


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        known = self.path in ("/health", "/server_info")
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        count = asked["sampling_params"]["max_new_tokens"]
        for number in range(1, count + 1):
            time.sleep(TOKEN_S)
            meta: dict[str, Any] = {"cached_tokens": 0}
            if number == count:
                meta["finish_reason"] = {"type": "length"}
            event = {"output_ids": [7] * number, "meta_info": meta}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
