"""Adapter copies: measured times, state after a failure, and clearing of freed slots."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import AdapterImage
from sglang_elora.platforms.emulated_link import Link
from sglang_elora.policy import CacheEntry
from tests.harness.swapper_world import AdapterSource, SwapperWorld, adapter_id

SLOTS = 64  # of an adapter
LAYERS = 8  # so that a copy has several pieces
COPY_S, BATCH_S = 1e-3, 0.4


class Clock:
    """A clock that advances only by ``sleep`` or when the test sets it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def link(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """An emulated link in the place of torch's streams for the time of a test."""
    num_bytes = world().host.get(adapter_id(0)).nbytes
    for name in ("Stream", "Event", "StreamContext", "stream", "current_stream"):
        monkeypatch.setattr(torch.cpu, name, getattr(torch.cpu, name))
    made = Link(num_bytes / COPY_S, 0.0, clock=clock, sleep=clock.sleep)
    made.install(torch.cpu)
    yield made


def world(num_slots: int = 4 * SLOTS, **options: Any) -> SwapperWorld:
    return SwapperWorld(
        num_slots, num_adapters=6, adapter_slots=SLOTS, num_layers=LAYERS, **options
    )


def test_copy_time_excludes_the_wait_for_the_running_batch(link: Link, clock: Clock) -> None:
    made = world()
    for i in (0, 1):
        made.forward_stream.busy_until_s = clock.now_s + BATCH_S  # type: ignore[attr-defined]
        made.arrive(adapter_id(i))
        made.step()
        copy = made.residency.copies[adapter_id(i)]
        clock.now_s += BATCH_S
        made.step()
        assert made.residency.copies, "the copy begins when the batch ends"
        clock.now_s += 1.5 * COPY_S
        assert copy.seconds() == pytest.approx(COPY_S)
        made.step()
        assert not made.residency.copies
    per_slot, per_copy = made.measured._link.rates()
    assert SLOTS * per_slot + per_copy == pytest.approx(COPY_S, rel=0.1)
    made.check()


@pytest.mark.parametrize("num_transfers_first", [1, 3])
def test_copy_time_includes_transfers_made_before_the_wait(
    link: Link, clock: Clock, num_transfers_first: int
) -> None:
    """On a GPU the first piece goes to the staging buffer before the copy waits for its slots."""
    made = world()
    made.forward_stream.busy_until_s = clock.now_s + BATCH_S  # type: ignore[attr-defined]
    write = made.residency.planes.write

    def write_staged(*args: Any, before_slots: Any, **options: Any) -> None:
        def transfer_then_wait() -> None:
            for _ in range(num_transfers_first):
                link.copy(made.host.get(adapter_id(0)).nbytes)
            before_slots()

        write(*args, before_slots=transfer_then_wait, **options)

    made.residency.planes.write = write_staged  # type: ignore[method-assign]
    made.arrive(adapter_id(0))
    made.step()
    copy = made.residency.copies[adapter_id(0)]
    assert copy.seconds() == pytest.approx((1 + num_transfers_first) * COPY_S)


@pytest.mark.parametrize("is_free_before", [True, False])
def test_copy_overlaps_the_running_batch_if_its_slots_were_free_before(
    link: Link, clock: Clock, is_free_before: bool
) -> None:
    from sglang_elora.srt.scheduler.swapper import prepare

    made = world()
    server: Any = SimpleNamespace(tree_cache=SimpleNamespace(elora=made))
    held = made.cache.allocator.alloc(4 * SLOTS)
    if is_free_before:
        made.cache.allocator.free(held)
    for busy_s in (0.0, BATCH_S):
        made.forward_stream.busy_until_s = clock.now_s + busy_s  # type: ignore[attr-defined]
        prepare(None, server)
    if not is_free_before:
        made.cache.allocator.free(held)
    made.arrive(adapter_id(0))
    made.step()
    clock.now_s += 1.5 * COPY_S
    made.step()
    assert bool(made.residency.copies) is not is_free_before
    clock.now_s += BATCH_S
    made.step()
    assert not made.residency.copies and made.is_resident(adapter_id(0))
    made.check()


class CompilationError(Exception):
    """Of no kind that torch raises, as Triton's own errors."""


def failing(
    made: SwapperWorld, where: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make the next copy fail, at the start or half-way through its pieces."""
    from sglang_elora.srt.mem_cache import copy_stream

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    if where == "page table":
        monkeypatch.setattr(copy_stream, "SlotTable", fail)
    elif where == "stream":
        monkeypatch.setattr(copy_stream, "make_copy_stream", fail)
    elif where == "slots":
        alloc = made.residency.allocator.alloc

        def alloc_unclonable(num_slots: int) -> torch.Tensor:
            slots: Any = alloc(num_slots).as_subclass(_NotCloned)
            return slots  # type: ignore[no-any-return]

        monkeypatch.setattr(made.residency.allocator, "alloc", alloc_unclonable)
    else:
        write, num_written = made.residency.planes._to_slots, [0]

        def write_half(*args: Any) -> None:
            num_written[0] += 1
            if num_written[0] > LAYERS // 2:
                raise error
            write(*args)

        monkeypatch.setattr(made.residency.planes, "_to_slots", write_half)


class _NotCloned(torch.Tensor):
    def clone(self, *_: Any, **__: Any) -> torch.Tensor:  # type: ignore[override]
        raise torch.OutOfMemoryError("no memory for slots")


def answers(made: SwapperWorld, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Adapters and texts of requests that have ended with an error, as they are sent."""
    from sglang_elora.srt.scheduler import swapper

    sent: list[tuple[str, str]] = []

    def send(answer: dict[str, Any], req: Any) -> None:
        sent.append((req.lora_id, answer["message"]))

    monkeypatch.setattr(swapper, "_make_abort_req", lambda req, finished_reason: finished_reason)
    made.scheduler._release_aborted_request = lambda req: None
    made.scheduler.ipc_channels = SimpleNamespace(
        send_to_tokenizer=SimpleNamespace(send_output=send)
    )
    return sent


@pytest.mark.parametrize(
    "error",
    [RuntimeError("launch failed"), CompilationError("no such kernel"), MemoryError("host")],
)
@pytest.mark.parametrize("where", ["page table", "stream", "half-way"])
@pytest.mark.parametrize("pinned", [False, True])
def test_unqueueable_copy_fails_its_requests_and_frees_its_slots(
    where: str, error: Exception, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world()
    sent, free = answers(made, monkeypatch), made.cache.allocator.available_size()
    if pinned:
        made.residency.pin(adapter_id(0))
    with monkeypatch.context() as patch:
        failing(made, where, error, patch)
        made.arrive(adapter_id(0))
        made.step()
    assert [(name, str(error) in text) for name, text in sent] == [(adapter_id(0), True)]
    assert not made.waiting and not made.residency.copies and not made.is_resident(adapter_id(0))
    assert made.cache.allocator.available_size() == free
    assert made.core.counts.adapter_copies_failed == 1
    made.check()
    made.arrive(adapter_id(0))  # not pinned: the next request loads it again
    made.step()
    made.step()
    assert made.is_resident(adapter_id(0)) and not made.residency.copies
    made.check()


def test_copy_without_memory_for_slot_numbers_fails_and_frees_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = world()
    sent, free = answers(made, monkeypatch), made.cache.allocator.available_size()
    with monkeypatch.context() as patch:
        failing(made, "slots", MemoryError(), patch)
        made.arrive(adapter_id(0))
        made.step()
    assert [name for name, _ in sent] == [adapter_id(0)]
    assert "no memory for slots" in sent[0][1]
    assert made.cache.allocator.available_size() == free
    made.check()


def test_session_kv_is_not_loaded_under_an_adapter_whose_copy_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The load would lock the adapter, whose slots have to be returned in the same step."""
    made = world()
    sent = answers(made, monkeypatch)
    loads: list[Any] = []
    end = made.core.node_of(adapter_id(0))  # a stub of a session's last node
    kv = SimpleNamespace(id=-1, evicted=True, entry=CacheEntry(False, 1, adapter_id(0)))
    monkeypatch.setattr(made.core, "find", lambda node_id: kv)
    monkeypatch.setattr(made.core, "path_of", lambda node: [kv, end])
    monkeypatch.setattr(made.cache.tree, "load_back", loads.append)
    made.swapper.planner._sessions = {end.id: 10**9}
    with monkeypatch.context() as patch:
        failing(made, "half-way", RuntimeError("launch failed"), patch)
        made.arrive(adapter_id(0))
        made.step()
    assert not loads and [name for name, _ in sent] == [adapter_id(0)]
    made.check()
    made.arrive(adapter_id(0))
    made.step()
    assert len(loads) == 1, "once its copy is queued, the KV follows"


FP8 = torch.float8_e4m3fn


def paged_world(page_size: int, kv_dtype: torch.dtype) -> SwapperWorld:
    """Weights are 3.4e38 in float32, whose bytes 0x7f are NaN in float8_e4m3fn."""
    made = world(page_size=page_size, kv_dtype=kv_dtype)
    like = made.host.get(adapter_id(0))
    large = torch.full((like.nbytes,), 0x7F, dtype=torch.uint8)
    image = AdapterImage(like.layout, like.dtype, like.num_layers, (large,), 1.0, "large")
    source = AdapterSource("large", "large", image.layout, image.nbytes, False, image=image)
    made.residency.register(source)
    assert all(chunk.view(image.dtype).isfinite().all() for chunk in image.chunks)
    return made


def is_finite(made: SwapperWorld) -> bool:
    planes = [*made.pool.k_buffer, *made.pool.v_buffer]
    return all(bool(plane.float().isfinite().all()) for plane in planes)


def leave(made: SwapperWorld, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "displaced":
        answers(made, monkeypatch)
        with monkeypatch.context() as patch:
            failing(made, "half-way", RuntimeError("launch failed"), patch)
            made.arrive("large")
            made.step()
        return
    made.arrive("large")
    made.step()
    made.waiting.clear()
    if how != "flushed under way":
        made.step()
    assert made.is_resident("large") and not is_finite(made)
    if how == "evicted":
        made.cache.evict(SLOTS)
    elif how == "retired":
        made.residency.retire("large")
    else:
        made.core.reset()
        made.cache.allocator.clear()


@pytest.mark.parametrize("how", ["evicted", "retired", "displaced", "flushed under way"])
def test_pages_freed_by_an_adapter_hold_no_fp8_nan_bytes(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = paged_world(4, FP8)
    leave(made, how, monkeypatch)
    assert (
        not made.is_resident("large")
        if how != "retired"
        else "large" not in made.residency.adapter_table
    )
    assert is_finite(made)


@pytest.mark.parametrize(("page_size", "kv_dtype"), [(1, FP8), (4, torch.float32)])
def test_freed_pages_are_not_cleared_without_paged_fp8_kv(
    page_size: int, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = paged_world(page_size, kv_dtype)
    cleared: list[Any] = []
    monkeypatch.setattr(made.residency._copy_stream, "clear", cleared.append)
    made.arrive("large")
    made.step()
    made.waiting.clear()
    made.step()
    made.cache.evict(SLOTS)
    assert not made.is_resident("large") and not cleared


def test_freed_slots_are_cleared_before_the_next_batch(link: Link, clock: Clock) -> None:
    made = paged_world(4, FP8)
    made.arrive("large")
    made.step()
    made.waiting.clear()
    clock.now_s += 1.0
    made.step()
    waits: list[Any] = []
    link.stream.wait_stream = waits.append  # type: ignore[method-assign]
    made.cache.evict(SLOTS)
    assert waits == [made.forward_stream], "the scheduler's stream waits for the batches"
    assert is_finite(made)


class _Streams:
    """A device whose streams come from a pool of three, in turn."""

    def __init__(self) -> None:
        self.num_drawn = 0

    def Stream(self, priority: int = 0) -> Any:
        self.num_drawn += 1
        return SimpleNamespace(cuda_stream=self.num_drawn % 3)


def test_copy_stream_is_neither_the_forward_nor_the_schedule_stream() -> None:
    from sglang_elora.srt.mem_cache.link import make_copy_stream

    device = _Streams()
    forward, schedule = device.Stream(), device.Stream()
    device.num_drawn = 3  # the pool repeats the first two
    stream = make_copy_stream(device, (forward, schedule))
    assert stream.cuda_stream not in (forward.cuda_stream, schedule.cuda_stream)


def test_copy_stream_avoids_the_stream_current_at_the_first_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang draws its schedule stream again after the cache was built."""
    from sglang_elora.srt.mem_cache import copy_stream

    made, avoided = world(), []
    make = copy_stream.make_copy_stream

    def note(device: Any, avoid: Any) -> Any:
        avoided.append(tuple(avoid))
        return make(device, avoid)

    monkeypatch.setattr(copy_stream, "make_copy_stream", note)
    schedule = torch.cpu.Stream()
    with torch.cpu.stream(schedule):
        for i in (0, 1):
            made.arrive(adapter_id(i))
            made.step()
    assert avoided == [(made.forward_stream, schedule)]
