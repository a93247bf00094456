"""Session names for requests without a ``session_id``, from fields that clients send anyway.

Off unless ``--elora-session-from`` names the fields: a session stands for one conversation, and a
``user`` or a routing key may stand for several. If two conversations share a name, each turn of one
is taken as the end of the other.
"""

from __future__ import annotations

from typing import Any

from sglang_elora.config import ROUTING_KEY, USER, active_config
from sglang_elora.srt.tokenizer.request_checks import MAX_CHARS


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
    for field in active_config().session_fields:
        name = found.get(field)
        if isinstance(name, str) and 0 < len(name) <= MAX_CHARS:
            request.session_id = name
            return
