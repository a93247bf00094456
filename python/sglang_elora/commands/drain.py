"""``sglang-elora drain``: refuse new sessions and wait until the open ones have ended."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from sglang_elora.control.connections import LIMITS

PATH = "/elora/drain"
_POLL_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Drain a server. Returns 0 when nothing is left, 1 if the time is over or it did not answer.

    The server keeps running: stop it afterwards, or let it serve all again with ``--end``.
    """
    parser = argparse.ArgumentParser(prog="sglang-elora drain", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--api-key", help="the server's --admin-api-key, where it has one")
    parser.add_argument("--wait", type=float, default=300.0, help="most seconds to wait")
    parser.add_argument(
        "--refuse-after",
        type=float,
        default=10.0,
        help="seconds until new sessions are refused, in which routers see that it is not ready",
    )
    parser.add_argument(
        "--session-idle",
        type=float,
        default=60.0,
        help="seconds without a request after which a session is not waited for",
    )
    parser.add_argument("--end", action="store_true", help="serve all sessions again instead")
    options = parser.parse_args(argv)
    headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
    with httpx.Client(base_url=options.url, headers=headers, timeout=70, limits=LIMITS) as http:
        try:
            if options.end:
                _answer(http.delete(PATH))
                return 0
            body = {
                "refuse_after_s": options.refuse_after,
                "session_idle_s": options.session_idle,
            }
            status = _answer(http.post(PATH, json=body))
            deadline_s = time.monotonic() + options.wait
            while not status["refusing"] or status["num_requests"] or status["open_sessions"]:
                if time.monotonic() >= deadline_s:
                    print(f"{options.url}: after {options.wait:g} s {_left(status)}")
                    return 1
                time.sleep(_POLL_S)
                status = _answer(http.get(PATH))
        except httpx.HTTPError as error:
            print(f"{options.url}: {error}", file=sys.stderr)
            return 1
    print(f"{options.url}: drained")
    return 0


def _answer(response: httpx.Response) -> dict[str, Any]:
    response.raise_for_status()
    status: dict[str, Any] = response.json()
    return status


def _left(status: dict[str, Any]) -> str:
    return f"{status['num_requests']} requests and {status['open_sessions']} sessions are left"
