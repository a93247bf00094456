"""Calls between the tokenizer workers of one server (``--tokenizer-worker-num``).

A call is a control message: it goes to the scheduler, which sends it back, and SGLang's router
sends it to every worker. Answers take the same way. So a call is handled by a worker after
everything that the scheduler sent to it before.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import zmq
from sglang.srt.runtime_context import get_parallel, get_serving
from sglang.utils import TypeBasedDispatcher

from sglang_elora.srt.messages import WorkersAnswer, WorkersCall

if TYPE_CHECKING:
    from sglang.srt.managers.multi_tokenizer_mixin import MultiTokenizerRouter
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""Seconds to wait for a worker's answer. One that has just died or is starting gives none, and asks
for what it missed before it serves (``shared_table``); raising this delays loads meanwhile."""

_POLL_S = 0.02

T = TypeVar("T")
_Handler = Callable[[bytes], Awaitable[Any]]


class Workers:
    """The other tokenizer workers, as seen from one. There are none in a server with one, and with
    ``--dp-size``."""

    def __init__(self, manager: TokenizerManager) -> None:
        self._manager = manager
        self._handlers: dict[str, _Handler] = {}
        self._asked: dict[str, asyncio.Queue[bytes]] = {}
        several = get_serving().tokenizer_worker_num > 1 and get_parallel().dp_size == 1
        self.num_others = get_serving().tokenizer_worker_num - 1 if several else 0

    def handle(self, do: str, kind: type[T], handler: Callable[[T], Awaitable[Any]]) -> None:
        """Answer calls of others by what ``handler`` returns for their data."""
        self._handlers[do] = lambda data: handler(msgspec.msgpack.decode(data, type=kind))

    def add_to(self, dispatcher: TypeBasedDispatcher) -> None:
        """Register the handlers of calls and answers."""
        dispatcher += TypeBasedDispatcher(
            [(WorkersCall, self._called), (WorkersAnswer, self._answered)]
        )

    async def ask(
        self, do: str, data: Any, kind: type[T], patience_s: float = PATIENCE_S
    ) -> list[T]:
        """Call all others, and wait for their answers.

        Returns:
            The answers that came within ``patience_s``, in no order. Empty without others.
        """
        if not self.num_others:
            return []
        manager, rid = self._manager, uuid.uuid4().hex
        answers: list[T] = []
        manager.auto_create_handle_loop()
        queue = self._asked[rid] = asyncio.Queue()
        try:
            call = WorkersCall(rid=rid, do=do, data=msgspec.msgpack.encode(data))
            manager._dispatch_to_scheduler(call)
            async with asyncio.timeout(patience_s):
                while len(answers) < self.num_others:
                    answers.append(msgspec.msgpack.decode(await queue.get(), type=kind))
        except TimeoutError:
            logger.warning(
                "%d of %d other tokenizer workers answered %r within %.0f s",
                *(len(answers), self.num_others, do, patience_s),
            )
        finally:
            del self._asked[rid]
        return answers

    def _called(self, call: WorkersCall) -> None:
        handler = self._handlers.get(call.do)
        if call.rid in self._asked or handler is None:
            return
        task = asyncio.get_running_loop().create_task(self._answer(handler, call))
        self._manager.asyncio_tasks.add(task)
        task.add_done_callback(self._manager.asyncio_tasks.discard)

    async def _answer(self, handler: _Handler, call: WorkersCall) -> None:
        try:
            data = msgspec.msgpack.encode(await handler(call.data))
        except Exception:
            logger.exception("call %r of another tokenizer worker failed", call.do)
            return  # the caller's patience ends
        answer = WorkersAnswer(rid=call.rid, to=call.http_worker_ipc or "", data=data)
        self._manager._dispatch_to_scheduler(answer)

    def _answered(self, answer: WorkersAnswer) -> None:
        if (queue := self._asked.get(answer.rid or "")) is not None:
            queue.put_nowait(answer.data)


async def pass_on(
    original: Callable[..., Awaitable[None]], self: MultiTokenizerRouter, recv_obj: Any
) -> None:
    """Send a call to every worker. Runs around the router's ``_distribute_result_to_workers``,
    which sends a message to one."""
    if not isinstance(recv_obj, WorkersCall):
        return await original(self, recv_obj)
    for name in self.all_worker_ipcs:
        self.socket_mapping.send_output(name, recv_obj)


class HostLock:
    """A lock that one process of this server holds at a time; it is free when its holder dies.

    Args:
        manager: Its connection to the router names the server.
        what: Name of the lock.
    """

    def __init__(self, manager: TokenizerManager, what: str) -> None:
        endpoint = manager.send_to_scheduler.getsockopt_string(zmq.LAST_ENDPOINT)
        digest = hashlib.sha256(endpoint.encode()).hexdigest()[:32]  # such a name is short
        self._name = f"\0sglang_elora.{what}.{digest}"
        self._held: socket.socket | None = None

    async def acquire(self) -> None:
        while not self.try_acquire():
            await asyncio.sleep(_POLL_S)

    def try_acquire(self) -> bool:
        """Take the lock if it is free. An address of a socket without a file is in use until its
        process closes it or ends.

        Raises:
            OSError: The system has no such addresses.
        """
        held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            held.bind(self._name)
        except OSError as error:
            held.close()
            if error.errno == errno.EADDRINUSE:
                return False
            raise
        self._held = held
        return True

    def release(self) -> None:
        """Free the lock, which this object must hold."""
        assert self._held is not None, "the lock is not held"
        self._held.close()
        self._held = None
