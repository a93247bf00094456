"""What SGLang's key check leaves open: WebSockets, and orders from other sites' pages."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from sglang.srt.runtime_context import get_serving
from sglang.srt.utils.auth import AuthDecision, AuthLevel, _get_auth_level_from_app_and_scope
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

PAGE = "/elora/ui"


class HttpGuard:
    """Middleware of the server's application.

    A page of another site, open in the browser of somebody who reaches this server, may send it
    requests, and SGLang allows it to by CORS. For users' endpoints that is meant. Where no key
    stands before the endpoints of admins, those are for pages of this server, and for what is no
    browser.

    Args:
        app: What it stands before.
        routes: SGLang's application.
    """

    def __init__(self, app: ASGIApp, routes: FastAPI) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            name.lower(): value.decode("latin-1") for name, value in scope.get("headers", ())
        }
        keys = get_serving()
        if scope["type"] == "websocket" and not _has_key(headers, keys.api_key):
            await send({"type": "websocket.close", "code": 1008, "reason": "Unauthorized"})
        elif (
            scope["type"] == "http"
            and not (keys.api_key or keys.admin_api_key)
            and scope["method"] != "OPTIONS"
            and _is_foreign(headers)
            and _get_auth_level_from_app_and_scope(self._routes, scope) != AuthLevel.NORMAL
        ):
            text = "an order from a page of another site: set --admin-api-key to allow it"
            await JSONResponse({"error": text}, status_code=403)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def open_page(
    original: Callable[..., AuthDecision], *, method: str, path: str, **options: Any
) -> AuthDecision:
    """Around ``decide_request_auth``: a browser cannot send a key for a page that it opens. There
    is nothing in it; what it shows, it asks for with the key that it was given."""
    if method == "GET" and path == PAGE:
        return AuthDecision(allowed=True)
    return original(method=method, path=path, **options)


def _has_key(headers: dict[bytes, str], api_key: str | None) -> bool:
    scheme, _, key = headers.get(b"authorization", "").partition(" ")
    is_same = secrets.compare_digest(key.encode(), (api_key or "").encode())
    return not api_key or (scheme.lower() == "bearer" and is_same)


def _is_foreign(headers: dict[bytes, str]) -> bool:
    """Whether a browser says so. Some of SGLang's orders are GETs, which have no Origin."""
    if headers.get(b"sec-fetch-site") in ("cross-site", "same-site"):
        return True
    origin = headers.get(b"origin")
    return origin is not None and urlsplit(origin).netloc != headers.get(b"host")
