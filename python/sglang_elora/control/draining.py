"""The sessions that a draining server still serves."""

from __future__ import annotations

from collections.abc import Iterable


class Draining:
    """Sessions that were open when the drain began; all others are refused.

    Args:
        sessions: Their names.
        now_s: Any clock in seconds.
    """

    def __init__(self, sessions: Iterable[str], now_s: float) -> None:
        self._used_s = dict.fromkeys(sessions, now_s)

    def admits(self, session: str | None, now_s: float) -> bool:
        """Whether a request of this session (None: of none) is served; if so, it is used now."""
        if session is None or session not in self._used_s:
            return False
        self._used_s[session] = now_s
        return True

    def used_since(self, since_s: float) -> list[str]:
        """The sessions that were used at this time or later."""
        return [session for session, used_s in self._used_s.items() if used_s >= since_s]
