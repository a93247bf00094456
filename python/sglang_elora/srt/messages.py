"""What tokenizer and scheduler processes say to each other of the cache, over SGLang's ZMQ channel.

Requests of a tokenizer process reach every rank of the tensor-parallel group, in one order, as
SGLang's own do. Tags and the order of fields are what travels: both only grow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import zmq
from sglang.srt.managers.io_struct import BaseReq, hook_custom_types

from sglang_elora.control import Changes

_Message: Any = (
    BaseReq  # a struct of keywords that travels as an array, for which mypy has no types
)


class AdapterHint(BaseReq, tag="elora.hint", kw_only=True):  # type: ignore[call-arg]
    """Requests with these adapters (ids), and of these sessions, are about to come. Nothing is
    answered."""

    adapters: list[str]
    sessions: list[str] = msgspec.field(default_factory=list)


class StateRequest(BaseReq, tag="elora.state", kw_only=True):  # type: ignore[call-arg]
    """What has changed since the state had this version."""

    version: int


class StateAnswer(BaseReq, tag="elora.state.answer", kw_only=True):  # type: ignore[call-arg]
    changes: Changes


class AdapterOrder(BaseReq, tag="elora.order", kw_only=True):  # type: ignore[call-arg]
    """``do`` this with an adapter: prefetch, pin, unpin or evict; or prefetch_session, with the
    session's name in its place. Anything else is refused."""

    do: str
    adapter: str


class AdapterOrderAnswer(BaseReq, tag="elora.order.answer", kw_only=True):  # type: ignore[call-arg]
    """``error`` is empty where the order was carried out, or is on its way."""

    error: str
    tier: str  # of the adapter, afterwards; empty for a session


class OrderFailed(BaseReq, tag="elora.order.failed", kw_only=True):  # type: ignore[call-arg]
    """In place of SGLang's answer to an order that raised."""

    answer: str  # name of the class that the answer would have
    error: str


class Undecodable(BaseReq, tag="elora.undecodable", kw_only=True):  # type: ignore[call-arg]
    """In place of a message whose bytes say nothing."""

    reason: str


TYPES = (
    *(AdapterHint, StateRequest, StateAnswer, AdapterOrder, AdapterOrderAnswer),
    *(OrderFailed, Undecodable),
)


def register_types() -> None:
    """Make them known to SGLang's decoder. Once per process."""
    hook_custom_types(*TYPES)


def receive(original: Callable[..., Any], socket: Any, flags: int = 0) -> Any:
    """Around the scheduler's ``sock_recv``: it does not end by what somebody wrote to its socket.

    Raises:
        zmq.ZMQError: Nothing has come.
    """
    try:
        return original(socket, flags)
    except zmq.ZMQError:
        raise
    except Exception as error:  # noqa: BLE001  # pickle, SGLang's default here, raises anything
        return Undecodable(reason=f"{type(error).__name__}: {error}")


def valid(message: BaseReq) -> Any:
    """The message, if its fields have their types: pickle does not look at them.

    Raises:
        msgspec.MsgspecError, AttributeError, TypeError: It is none.
    """
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message))
