"""Access checks that SGLang's key check lacks: for WebSockets, and for pages of other sites."""

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
    """Middleware that checks the key of WebSockets and refuses cross-site requests to admin
    endpoints.

    A page of another site in the browser of a user who can reach this server may send requests to
    it, and SGLang's CORS settings allow that. For users' endpoints this is intended. Admin
    endpoints without a key are only for pages of this server and for clients that are not browsers.

    Args:
        app: The wrapped application.
        routes: SGLang's application.
    """

    def __init__(self, app: ASGIApp, routes: FastAPI) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # begins before a tokenizer worker has its settings
            return await self._app(scope, receive, send)
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
    """Allow the ELORA page without a key, because a browser cannot send one when it opens a page.
    The page contains no data; it requests data with the key that the user enters. Runs around
    ``decide_request_auth``."""
    if method == "GET" and path == PAGE:
        return AuthDecision(allowed=True)
    return original(method=method, path=path, **options)


def _has_key(headers: dict[bytes, str], api_key: str | None) -> bool:
    scheme, _, key = headers.get(b"authorization", "").partition(" ")
    is_same = secrets.compare_digest(key.encode(), (api_key or "").encode())
    return not api_key or (scheme.lower() == "bearer" and is_same)


def _is_foreign(headers: dict[bytes, str]) -> bool:
    """Whether the headers are those of a browser's cross-site request. ``Origin`` alone does not
    suffice: some of SGLang's control endpoints are GETs, which have none."""
    if headers.get(b"sec-fetch-site") in ("cross-site", "same-site"):
        return True
    origin = headers.get(b"origin")
    return origin is not None and urlsplit(origin).netloc != headers.get(b"host")
