"""Draining a server before it is stopped: new sessions are refused, open ones served to their end.

First the server only says that it is not ready, until routers have seen it; then it refuses. A
session is open if it has KV on this server by then, a request in progress, or is a streaming
session (``/open_session``). With ``--tokenizer-worker-num`` each worker has its own copy of the
names.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import CloseSessionReqInput

from sglang_elora.control import Draining
from sglang_elora.srt.messages import SessionsAnswer, SessionsRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from sglang_elora.srt.tokenizer.tokenizer_control import TokenizerControl

REFUSE_AFTER_S = 10.0
"""Default of ``refuse_after_s``, in seconds. Lower than a router's interval of health checks loses
requests that it still sends here; raising it makes each drain longer."""

SESSION_IDLE_S = 60.0
"""Default of ``session_idle_s``, in seconds. Raising it waits longer for the next turns of chats,
which otherwise have to be computed again on another server."""


class DrainOptions(msgspec.Struct, frozen=True):
    """How to drain.

    Attributes:
        refuse_after_s: Seconds from the order until new sessions are refused.
        session_idle_s: Seconds without a request after which a session is not waited for.
    """

    refuse_after_s: float = REFUSE_AFTER_S
    session_idle_s: float = SESSION_IDLE_S


class DrainStatus(msgspec.Struct, frozen=True):
    """The answer of ``/elora/drain``.

    Attributes:
        draining: Whether the server is to be stopped; it is not ready then.
        refusing: Whether requests of new sessions are refused.
        num_requests: Requests in progress, health checks left out.
        open_sessions: Sessions with KV here that were used within ``session_idle_s``. 0 if the
            server is not draining.
    """

    draining: bool
    refusing: bool
    num_requests: int
    open_sessions: int


class _State(msgspec.Struct, frozen=True):
    """What all workers know of a drain; ``sessions`` is None until new ones are refused."""

    options: DrainOptions
    sessions: list[str] | None = None


class _InProgress(msgspec.Struct, frozen=True):
    """What one worker has: requests, their sessions, and open sessions that it has used lately."""

    num_requests: int
    sessions: list[str]
    used: list[str]


class Drain:
    """Drains the server that a tokenizer process belongs to."""

    def __init__(self, manager: TokenizerManager, control: TokenizerControl) -> None:
        self._manager, self._control = manager, control
        self._workers = manager.elora_workers
        self._state: _State | None = None
        self._draining: Draining | None = None
        self._later: asyncio.Task[None] | None = None  # will refuse new sessions
        self._workers.handle("drain.set", _State | None, self._set)
        self._workers.handle("drain.get", type(None), self._get)
        self._workers.handle("drain.in_progress", type(None), self._in_progress)

    @property
    def is_draining(self) -> bool:
        return self._state is not None

    @property
    def is_refusing(self) -> bool:
        return self._draining is not None

    def admits(self, session: str | None) -> bool:
        """Whether a request of this session may be served."""
        return self._draining is None or self._draining.admits(session, time.monotonic())

    async def begin(self, options: DrainOptions) -> DrainStatus:
        """Begin a drain. A second order changes nothing, unless the first one could not find out
        which sessions are open. Raises NoAnswer."""
        if self._state is None:
            await self._set_everywhere(_State(options))
        if not self.is_refusing and (self._later is None or self._later.done()):
            if options.refuse_after_s > 0:
                self._later = asyncio.get_running_loop().create_task(self._refuse_later(options))
                self._manager.asyncio_tasks.add(self._later)
                self._later.add_done_callback(self._manager.asyncio_tasks.discard)
            else:
                await self._refuse(options)
        return await self.status()

    async def end(self) -> DrainStatus:
        """Serve all sessions again. Raises NoAnswer."""
        await self._set_everywhere(None)
        return await self.status()

    async def status(self) -> DrainStatus:
        """The requests and sessions that are left. Raises NoAnswer."""
        found, left = await self._everywhere(), set[str]()
        if self.is_draining:
            left = await self._open_sessions(found)
        if self.is_refusing:
            left &= {session for each in found for session in each.used}
        return DrainStatus(
            draining=self.is_draining,
            refusing=self.is_refusing,
            num_requests=sum(each.num_requests for each in found),
            open_sessions=len(left),
        )

    async def close_session(self, session: str) -> None:
        """Close a session, as ``POST /close_session`` does."""
        await self._manager.close_session(CloseSessionReqInput(session_id=session))

    async def join(self) -> None:
        """Drain if the other workers do: this one has just started."""
        for state in await self._workers.ask("drain.get", None, _State | None):
            if state is not None:
                await self._set(state)

    async def _refuse_later(self, options: DrainOptions) -> None:
        await asyncio.sleep(options.refuse_after_s)
        await self._refuse(options)

    async def _refuse(self, options: DrainOptions) -> None:
        sessions = await self._open_sessions(await self._everywhere())
        await self._set_everywhere(_State(options, sorted(sessions)))

    async def _open_sessions(self, found: list[_InProgress]) -> set[str]:
        answer: SessionsAnswer = await self._control.ask(SessionsRequest())
        return {*answer.sessions, *(session for each in found for session in each.sessions)}

    async def _everywhere(self) -> list[_InProgress]:
        others = await self._workers.ask("drain.in_progress", None, _InProgress)
        return [await self._in_progress(None), *others]

    async def _set_everywhere(self, state: _State | None) -> None:
        await self._set(state)
        await self._workers.ask("drain.set", state, type(None))

    async def _set(self, state: _State | None) -> None:
        self._state = state
        if state is None:
            self._draining = None
            if self._later is not None:
                self._later.cancel()
        elif state.sessions is None:
            self._draining = None
        elif self._draining is None:
            self._draining = Draining(state.sessions, time.monotonic())

    async def _get(self, _: None) -> _State | None:
        return self._state

    async def _in_progress(self, _: None) -> _InProgress:
        requests = {
            rid: state.obj
            for rid, state in self._manager.rid_to_state.items()
            if not rid.startswith(HEALTH_CHECK_RID_PREFIX)
        }
        sessions = {s for obj in requests.values() if (s := _session_of(obj)) is not None}
        used: list[str] = []
        if self._draining is not None and self._state is not None:
            since_s = time.monotonic() - self._state.options.session_idle_s
            used = self._draining.used_since(since_s)
        return _InProgress(num_requests=len(requests), sessions=sorted(sessions), used=used)


def _session_of(obj: Any) -> str | None:
    session = getattr(obj, "session_id", None)
    return session if isinstance(session, str) else None


def is_ready(original: Callable[[TokenizerManager], bool], self: TokenizerManager) -> bool:
    """Whether the server takes new sessions. Runs around ``TokenizerManager.is_ready``, which
    ``GET /ready`` answers."""
    control: TokenizerControl | None = getattr(self, "elora", None)
    return original(self) and not (control is not None and control.drain.is_draining)
