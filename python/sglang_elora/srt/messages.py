"""Control messages between tokenizer and scheduler processes, over SGLang's ZMQ channel.

Messages from a tokenizer process reach every tensor-parallel rank in the same order, as SGLang's
own do. Tags and field order are the wire format: append to both, never change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import zmq
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import BaseReq, hook_custom_types

from sglang_elora.control import Changes

_Message: Any = BaseReq  # a keyword-only struct, encoded as an array; mypy has no types for it


class AdapterHint(BaseReq, tag="elora.hint", kw_only=True):  # type: ignore[call-arg]
    """Announces requests with these adapters (ids) and of these sessions. Has no answer."""

    adapters: list[str]
    sessions: list[str] = msgspec.field(default_factory=list)


class StateRequest(BaseReq, tag="elora.state", kw_only=True):  # type: ignore[call-arg]
    """Asks for the changes since this version of the state."""

    version: int


class StateAnswer(BaseReq, tag="elora.state.answer", kw_only=True):  # type: ignore[call-arg]
    changes: Changes


class AdapterOrder(BaseReq, tag="elora.order", kw_only=True):  # type: ignore[call-arg]
    """Orders an action (``do``) on an adapter id: prefetch, read, pin, unpin or evict; or
    prefetch_session, with a session's name as ``adapter``. Other actions are refused."""

    do: str
    adapter: str


class AdapterOrderAnswer(BaseReq, tag="elora.order.answer", kw_only=True):  # type: ignore[call-arg]
    """Answers an order. ``error`` is empty if the order was completed or started."""

    error: str
    tier: str  # tier of the adapter after the order; empty for a session


class OrderFailed(BaseReq, tag="elora.order.failed", kw_only=True):  # type: ignore[call-arg]
    """Replaces SGLang's answer to a request whose handler raised."""

    answer: str  # class name of SGLang's answer
    error: str


class Undecodable(BaseReq, tag="elora.undecodable", kw_only=True):  # type: ignore[call-arg]
    """Replaces a message that could not be decoded."""

    reason: str


class WorkersCall(BaseReq, tag="elora.workers", kw_only=True):  # type: ignore[call-arg]
    """Calls the other tokenizer workers. The scheduler sends it back, the router to all of them."""

    do: str
    data: bytes  # msgpack


class WorkersAnswer(BaseReq, tag="elora.workers.answer", kw_only=True):  # type: ignore[call-arg]
    """A tokenizer worker's answer to a call. The scheduler sends it to the caller."""

    to: str  # the caller's ``http_worker_ipc``
    data: bytes  # msgpack


class LoadedRequest(BaseReq, tag="elora.loaded", kw_only=True):  # type: ignore[call-arg]
    """Asks for the loaded adapters."""


class LoadedAnswer(BaseReq, tag="elora.loaded.answer", kw_only=True):  # type: ignore[call-arg]
    adapters: list[LoRARef]


class SessionsRequest(BaseReq, tag="elora.sessions", kw_only=True):  # type: ignore[call-arg]
    """Asks for the open sessions that have KV on the device or the host."""


class SessionsAnswer(BaseReq, tag="elora.sessions.answer", kw_only=True):  # type: ignore[call-arg]
    sessions: list[str]


TYPES = (
    *(AdapterHint, StateRequest, StateAnswer, AdapterOrder, AdapterOrderAnswer),
    *(OrderFailed, Undecodable, WorkersCall, WorkersAnswer, LoadedRequest, LoadedAnswer),
    *(SessionsRequest, SessionsAnswer),
)


def register_types() -> None:
    """Register the message types with SGLang's decoder. Call once per process."""
    hook_custom_types(*TYPES)


def receive(original: Callable[..., Any], socket: Any, flags: int = 0) -> Any:
    """Return ``Undecodable`` for a message that cannot be decoded, so that it does not end the
    scheduler. Runs around the scheduler's ``sock_recv``.

    Raises:
        zmq.ZMQError: No message has arrived.
    """
    try:
        return original(socket, flags)
    except zmq.ZMQError:
        raise
    except Exception as error:  # noqa: BLE001  # pickle, SGLang's default here, raises anything
        return Undecodable(reason=f"{type(error).__name__}: {error}")


def valid(message: BaseReq) -> Any:
    """The message, after a check of its fields' types, which pickle does not check.

    Raises:
        msgspec.MsgspecError, AttributeError, TypeError: The message is invalid.
    """
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))
