"""The mirror is the scheduler's state as of the last answer, of adapters that are loaded."""

from __future__ import annotations

import msgspec

from sglang_elora.control import AdapterState, Changes, Histogram, PoolState, StateMirror

POOL = PoolState(
    slots=100,
    free=50,
    adapters=10,
    kv=30,
    kv_base=5,
    kv_host=7,
    num_adapters=2,
    num_on_device=1,
    num_on_host=2,
    adapter_host_bytes=4096,
    num_waiting=0,
    num_running=1,
    counts={"adapter_loads": 3, "adapter_evictions.api": 1, "adapter_evictions": 2},
    waiting=["b", "gone"],
    running=["b", "a"],
    most_in_batch=256,
    load_s=Histogram(),
    num_sessions=6,
)


def adapter(adapter_id: str, tier: str = "host", tokens: int = 0) -> AdapterState:
    return msgspec.convert([adapter_id, tier, False, 0, 2048, tokens, 0, 0, None], AdapterState)


def changes(version: int, *adapters: AdapterState) -> Changes:
    return Changes(version, False, list(adapters), POOL)


def test_state_mirror_replaces_rows_by_later_ones() -> None:
    mirror = StateMirror()
    mirror.apply(changes(2, adapter("a"), adapter("b")), {"a", "b"})
    mirror.apply(changes(3, adapter("a", "device", 7)), {"a", "b"})
    assert mirror.version == 3 and mirror.pool == POOL
    assert mirror.adapters == {"a": adapter("a", "device", 7), "b": adapter("b")}


def test_state_mirror_drops_unloaded_adapters() -> None:
    mirror = StateMirror()
    mirror.apply(changes(2, adapter("a"), adapter("b")), {"a", "b"})
    mirror.apply(changes(2), {"b"})
    assert set(mirror.adapters) == {"b"}


def test_state_changes_survive_msgpack_round_trip() -> None:
    sent = changes(5, adapter("a", "loading"))
    packed = msgspec.msgpack.encode(sent)
    assert msgspec.msgpack.decode(packed, type=Changes) == sent
