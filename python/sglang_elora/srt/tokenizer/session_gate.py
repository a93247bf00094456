"""Middleware for sessions: names and ends them by headers, and refuses new ones during a drain.

SGLang's router passes on only the fields and endpoints that it knows: a chat through it loses its
``session_id``, and there is no ``/close_session``. Headers that begin with ``X-Request-Id-`` pass.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from sglang.srt.utils.auth import AuthLevel, _get_auth_level_from_app_and_scope
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang_elora.srt.tokenizer.request_checks import MAX_CHARS
from sglang_elora.srt.tokenizer.session_names import SESSION_HEADER, header_session, session_of

if TYPE_CHECKING:
    from sglang_elora.srt.tokenizer.drain import Drain

END_HEADER = "x-request-id-session-end"
"""``true``: the session of ``SESSION_HEADER`` is closed after this request."""

STARTS_NOTHING = frozenset(
    {
        "/api/show",
        "/close_session",
        "/detokenize",
        "/parse_function_call",
        "/separate_reasoning",
        "/tokenize",
        "/v1/detokenize",
        "/v1/messages/count_tokens",
        "/v1/tokenize",
    }
)
"""Endpoints of users that compute nothing on the model. They are open during a drain."""

RESPONSES = "/v1/responses/"
"""Begin of the paths of responses that were created before."""

_RETRY_AFTER_S = 1
_TRY_AGAIN_LATER = 1013  # of a WebSocket


class SessionGate:
    """Middleware around SGLang's endpoints, inside its checks of keys.

    Args:
        app: The wrapped application.
        server: SGLang's application; ``server.state.elora`` is the control channel, once there.
    """

    def __init__(self, app: ASGIApp, server: FastAPI) -> None:
        self._app = app
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        control = getattr(self._server.state, "elora", None)
        if control is None or scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        drain: Drain = control.drain
        if scope["type"] == "websocket":
            if drain.is_refusing:
                await receive()
                return await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER})
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        session = headers.get(SESSION_HEADER)
        if session is not None and not 0 < len(session) <= MAX_CHARS:
            error = f"{SESSION_HEADER} must have 1 to {MAX_CHARS} characters"
            return await _refuse(HTTPStatus.BAD_REQUEST, error)(scope, receive, send)
        header_session.set(session)
        if drain.is_refusing and self._starts_work(scope):
            body = await _read(receive)
            if not drain.admits(session_of(_parsed(body), headers)):
                error = "the server is draining: it takes no new sessions"
                return await _refuse(HTTPStatus.SERVICE_UNAVAILABLE, error)(scope, receive, send)
            receive = _again(body, receive)
        try:
            await self._app(scope, receive, send)
        finally:
            if session is not None and headers.get(END_HEADER, "").lower() == "true":
                await drain.close_session(session)

    def _starts_work(self, scope: Scope) -> bool:
        """Whether an endpoint computes something on the model, or opens a session."""
        path = scope["path"]
        if path == "/open_session":
            return True
        return (
            scope["method"] in ("POST", "PUT")
            and path not in STARTS_NOTHING
            and not path.startswith(RESPONSES)
            and _get_auth_level_from_app_and_scope(self._server, scope) == AuthLevel.NORMAL
        )


async def _read(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # the client is gone
            break
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """``receive`` as it was before the body was read."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:  # the endpoint would refuse it, or it is no JSON
        return {}
    return found if isinstance(found, dict) else {}


def _refuse(status: HTTPStatus, message: str) -> JSONResponse:
    """An error in the form of SGLang's OpenAI endpoints."""
    body = {
        "object": "error",
        "message": message,
        "type": status.phrase.replace(" ", ""),
        "param": None,
        "code": status.value,
    }
    retry = {"Retry-After": str(_RETRY_AFTER_S)} if status >= 500 else None
    return JSONResponse(body, status_code=status, headers=retry)
