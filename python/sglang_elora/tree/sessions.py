"""Sessions that requests name (``session_id``): what they use is expected back until they are over.

A session holds the path that its last turn ended on, from the adapter down. What a living session
holds is ``ALIVE`` for the policy. When a session is over (``POST /close_session``), what nobody but
it has ever used is ``OVER``, or the ``BEGINNING`` of a conversation, which others may share; of the
rest nothing is known, as of KV of requests without a session.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from sglang_elora.policy import CacheEntry, SessionState

MOST_SESSIONS = 16_384
"""Beyond it the one that has been silent for longest is forgotten."""

NOBODY: frozenset[str] = frozenset()


class Node(Protocol):
    """Of the tree. Its owner gives it ``sessions = NOBODY`` and ``num_sessions = 0``."""

    entry: CacheEntry
    parent: Any
    sessions: Any  # names of those alive that use it
    num_sessions: int  # that ever did


N = TypeVar("N", bound=Node)


class Sessions(Generic[N]):
    """One per tree. Each call is O(depth of a path).

    Args:
        path_of: Nodes from one up to its adapter.
        expect: Tells the policy what a node is now.
    """

    def __init__(
        self, path_of: Callable[[N], list[N]], expect: Callable[[N, SessionState], None]
    ) -> None:
        self._path_of, self._expect = path_of, expect
        # Longest silent first; a path has its end first.
        self._paths: OrderedDict[str, list[N]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paths)

    def turn(self, session: str, end: N) -> None:
        """A turn of this session is over, and its KV ends with this node."""
        path = self._path_of(end)
        for node in path:
            if not node.sessions:
                node.sessions = {session}
                node.num_sessions += 1
                self._update(node)
            elif session not in node.sessions:
                node.sessions.add(session)
                node.num_sessions += 1
        held = set(path)
        for node in self._paths.pop(session, ()):
            if node not in held:
                self._release(node, session)
        self._paths[session] = path
        while len(self._paths) > MOST_SESSIONS:
            silent, forgotten = self._paths.popitem(last=False)
            for node in forgotten:
                node.num_sessions += 1  # whether it is over nobody knows
                self._release(node, silent)

    def end_of(self, session: str) -> N | None:
        """Where its last turn ended, or what is left of that; None if it is not alive."""
        path = self._paths.get(session)
        return None if not path else path[0]

    def over(self, session: str) -> None:
        """No turn of it will come."""
        for node in self._paths.pop(session, ()):
            self._release(node, session)

    def split(self, node: N, above: N) -> None:
        """The first part of ``node``'s KV is ``above``, a node of its own, from now on."""
        above.num_sessions = node.num_sessions
        if node.sessions:
            above.sessions = set(node.sessions)
            for session in above.sessions:
                self._paths[session].append(above)
        self._update(node)  # which begins nothing any more

    def drop(self, node: N) -> None:
        """The node leaves the tree."""
        for session in node.sessions:
            self._paths[session].remove(node)
        node.sessions = NOBODY
        if node.entry.is_adapter:  # which may come again
            self._expect(node, SessionState.UNKNOWN)

    def clear(self) -> None:
        """The tree is empty."""
        self._paths.clear()

    def _release(self, node: N, session: str) -> None:
        node.sessions.discard(session)
        if not node.sessions:
            node.sessions = NOBODY
            self._update(node)

    def _update(self, node: N) -> None:
        session_state = SessionState.UNKNOWN
        if node.sessions:
            session_state = SessionState.ALIVE
        elif node.num_sessions == 1 and not node.entry.is_adapter:
            is_first = node.parent.parent is None or node.parent.entry.is_adapter
            session_state = SessionState.BEGINNING if is_first else SessionState.OVER
        self._expect(node, session_state)
