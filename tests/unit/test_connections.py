"""Limits of the connections that clients keep open."""

from __future__ import annotations

from sglang.srt.environ import envs

from sglang_elora.control.connections import KEEP_ALIVE_S, LIMITS


def test_a_client_gives_up_an_idle_connection_well_before_the_server_closes_it() -> None:
    assert LIMITS.keepalive_expiry == KEEP_ALIVE_S <= envs.SGLANG_TIMEOUT_KEEP_ALIVE.default / 2
