"""Open sessions (``session_id`` of requests) and the tree nodes that their last turns used.

A session holds the path from the adapter down to the node at which its last turn ended. The policy
sees nodes that an open session holds as ``ALIVE``. When a session is closed (``POST
/close_session``), nodes that no other session has used become ``OVER``, or ``BEGINNING`` at the
start of a prompt, which other sessions may share. All other nodes are ``UNKNOWN``, as is the KV of
requests without a session.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from sglang_elora.policy import CacheEntry, SessionState

MOST_SESSIONS = 16_384
"""Most open sessions. Beyond it, the session that was inactive for longest is forgotten."""

NOBODY: frozenset[str] = frozenset()


class Node(Protocol):
    """A node of the cache tree, created with ``sessions = NOBODY`` and ``num_sessions = 0``."""

    entry: CacheEntry
    parent: Any
    sessions: Any  # set of the open sessions that hold it
    num_sessions: int  # sessions that ever held it


N = TypeVar("N", bound=Node)


class Sessions(Generic[N]):
    """The open sessions of one tree. Each call is O(depth of a path).

    Args:
        path_of: Returns the nodes from a node up to its adapter.
        expect: Sets the ``SessionState`` of a node.
    """

    def __init__(
        self, path_of: Callable[[N], list[N]], expect: Callable[[N, SessionState], None]
    ) -> None:
        self._path_of, self._expect = path_of, expect
        # The session inactive for longest is first; a path begins with its deepest node.
        self._paths: OrderedDict[str, list[N]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paths)

    def turn(self, session: str, end: N) -> None:
        """Record that a turn of the session has ended, with its KV ending at node ``end``."""
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
                node.num_sessions += 1  # unknown whether it is closed: state becomes UNKNOWN
                self._release(node, silent)

    def end_of(self, session: str) -> N | None:
        """The deepest remaining node of its last turn; None if the session is not open."""
        path = self._paths.get(session)
        return None if not path else path[0]

    def with_kv(self) -> list[str]:
        """The open sessions whose last turn left KV that is still cached."""
        return [session for session, path in self._paths.items() if path]

    def over(self, session: str) -> None:
        """Close the session: it will have no further turn."""
        for node in self._paths.pop(session, ()):
            self._release(node, session)

    def split(self, node: N, above: N) -> None:
        """Record that the first part of ``node``'s KV was split off into the new ``above``."""
        above.num_sessions = node.num_sessions
        if node.sessions:
            above.sessions = set(node.sessions)
            for session in above.sessions:
                self._paths[session].append(above)
        self._update(node)  # it is no longer at the start of a prompt

    def drop(self, node: N) -> None:
        """Record that the node is removed from the tree."""
        for session in node.sessions:
            self._paths[session].remove(node)
        node.sessions = NOBODY
        if node.entry.is_adapter:  # the entry is kept: the adapter may be loaded again
            self._expect(node, SessionState.UNKNOWN)

    def clear(self) -> None:
        """Forget all sessions, after a reset of the tree."""
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
