"""Limits of the HTTP connections that clients keep open to a server."""

from __future__ import annotations

import httpx

KEEP_ALIVE_S = 2.0
"""Seconds after which an idle connection is no longer used. SGLang's server closes its own after
5 seconds (`SGLANG_TIMEOUT_KEEP_ALIVE`), and so would httpx: a request sent at that moment fails
with "Server disconnected without sending a response"."""

LIMITS = httpx.Limits(
    max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S
)
"""For `httpx.Client` and `httpx.AsyncClient`: as many connections as there are requests."""
