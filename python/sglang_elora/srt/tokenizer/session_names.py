"""Session names for requests without a ``session_id``: from a header, or from fields that clients
send anyway.

The latter are off unless ``--elora-session-from`` names the fields: a session stands for one
conversation, and a ``user`` or a routing key may stand for several. If two conversations share a
name, each turn of one is taken as the end of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from sglang_elora.config import ROUTING_KEY, USER, active_config
from sglang_elora.srt.tokenizer.request_checks import MAX_CHARS

SESSION_HEADER = "x-request-id-session"
"""Names the session of a request whose body has no ``session_id``. SGLang's router passes it on, as
every header that begins with ``X-Request-Id-``."""

header_session: ContextVar[str | None] = ContextVar("header_session", default=None)
"""The session that a header of the current HTTP request names; a task serves each request."""


def session_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    """The session that a request names, by its parsed body and headers."""
    session = body.get("session_id")
    if session is None and isinstance(params := body.get("session_params"), dict):
        session = params.get("id")
    if session is None:
        session = header_session.get()
    if session is None:
        key = headers.get("x-smg-routing-key", body.get("routing_key"))
        session = _configured({ROUTING_KEY: key, USER: body.get("user")})
    return session if isinstance(session, str) else None


def name_openai_session(request: Any, raw_request: Any) -> None:
    """Set the ``session_id`` of an OpenAI request with one prompt and one answer, if it has none.

    Args:
        raw_request: The HTTP request; None if there is none.
    """
    if not hasattr(request, "session_id") or getattr(request, "n", None) not in (None, 1):
        return
    prompt = getattr(request, "prompt", None)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return
    headers = {} if raw_request is None else raw_request.headers
    found = {ROUTING_KEY: headers.get("x-smg-routing-key"), USER: getattr(request, "user", None)}
    _name_session(request, found)


def name_native_session(obj: Any) -> None:
    """Set the ``session_id`` of a native request with one prompt, if it has none."""
    if hasattr(obj, "session_id") and obj.is_single:
        _name_session(obj, {ROUTING_KEY: getattr(obj, "routing_key", None)})


def _name_session(request: Any, found: dict[str, Any]) -> None:
    if request.session_id is not None or getattr(request, "session_params", None) is not None:
        return
    session = header_session.get() or _configured(found)
    if session is not None:
        request.session_id = session


def _configured(found: Mapping[str, Any]) -> str | None:
    """The first of the fields of ``--elora-session-from`` that has a usable name."""
    for field in active_config().session_fields:
        name = found.get(field)
        if isinstance(name, str) and 0 < len(name) <= MAX_CHARS:
            return name
    return None
