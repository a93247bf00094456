"""Hook bodies of ``--elora-check-streams``, which turn device work into ``AsyncDevice`` operations.

Copies of KV between host and device, copies of adapters and of their page tables, and forward
passes with their sampling become operations of that device, with the slots that they read and
write. Freed slots are poisoned, and so are the destinations of copies that have not run yet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_elora.config import EloraConfig
from sglang_elora.pages import AdapterImage, HostArena, KVPlanes, SlotTable
from sglang_elora.platforms.async_device import AsyncDevice, Order
from sglang_elora.platforms.race_check import Access, Blocks

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput

SLOTS, HOST_SLOTS = "slots of the KV pool", "slots of the host's KV pool"
WINDOW_SLOTS = "slots of the sliding windows' KV pool"
HOST_BLOCKS = "blocks of adapters in host memory"

_POISON = 0xFF
"""Each byte of poisoned memory: NaN in every floating-point type, -1 as an integer."""


def use_adversarial_streams(config: EloraConfig) -> None:
    """Replace torch's CPU streams and events, and run adapters' copies on them."""
    name = config.check_streams
    seed = int(name) if name.isdecimal() else 0
    os.environ["SGLANG_ENABLE_WAR_BARRIER"] = "1"  # CUDA's default
    sys.setrecursionlimit(20_000)  # delayed operations run nested in those that wait for them
    AsyncDevice(Order.RANDOM if name.isdecimal() else Order(name), seed).install(torch.cpu)
    original_table, original_arena = SlotTable.__init__, HostArena.__init__
    original_write, original_to_slots = KVPlanes.write, KVPlanes._to_slots
    image_blocks: list[Blocks] = []  # blocks of the image that is being written
    arena: HostArena | None = None  # the arena of this process

    def make_table(self: SlotTable, slots: torch.Tensor) -> None:
        self.slots = torch.full_like(slots, -1, dtype=torch.int32)
        made, self.slot_numbers = self.slots, _numbers(slots)  # type: ignore[attr-defined]

        def fill() -> None:
            original_table(self, slots)
            self.slots = made.copy_(self.slots)

        _device().launch("page table", fill)

    def to_slots(
        self: KVPlanes, memory: torch.Tensor, table: SlotTable, *rest: Any, **options: Any
    ) -> None:
        _, first_layer = rest
        slots = table.slot_numbers  # type: ignore[attr-defined]
        layers = range(first_layer, first_layer + len(memory))
        rows = [plane[layer] for plane in self._planes for layer in layers]
        _device().launch(
            "copy of an adapter",
            partial(original_to_slots, self, memory, table, *rest, **options),
            reads=[(HOST_BLOCKS, block) for block in image_blocks],
            writes=[(SLOTS, slots)],
            poison=partial(_poison, rows, slots),
        )

    def write(self: KVPlanes, table: SlotTable, image: AdapterImage, **options: Any) -> None:
        image_blocks[:] = [_blocks_of(arena, chunk) for chunk in image.chunks]
        original_write(self, table, image, **options)

    def reuse(memory: torch.Tensor) -> None:
        _device().host_writes("reuse of host memory", HOST_BLOCKS, _blocks_of(arena, memory))
        memory.fill_(_POISON)

    def make_arena(self: HostArena, *args: Any) -> None:
        nonlocal arena
        original_arena(self, *args)
        self.on_freed, arena = reuse, self

    HostArena.__init__ = make_arena  # type: ignore[method-assign,assignment]
    SlotTable.__init__ = make_table  # type: ignore[method-assign]
    KVPlanes.write = write  # type: ignore[method-assign]
    KVPlanes._to_slots = to_slots  # type: ignore[method-assign]


def mark_scheduler_streams(result: None, self: Scheduler) -> None:
    """Make the scheduler's forward and copy streams asynchronous. Runs after
    ``Scheduler.init_overlap``.

    The schedule stream is not changed: its operations are torch's, which run immediately.
    """
    if self.enable_overlap:
        self.forward_stream.asynchronous = True
        self.copy_stream.asynchronous = True


def load_kv(
    original: Callable[..., None],
    self: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    layer_id: int,
    *args: Any,
    **options: Any,
) -> None:
    """Launch the copy of one layer's KV from the host as an operation. Runs around the copy;
    indices are int64 ``[tokens]``."""
    host, slots = _numbers(host_indices), _numbers(device_indices)
    rows = [plane[layer_id] for plane in _planes_of(device_pool)]
    _device().launch(
        "load of KV",
        partial(
            original, self, device_pool, host_indices, device_indices, layer_id, *args, **options
        ),
        reads=[(HOST_SLOTS, host)],
        writes=[(SLOTS, slots)],
        poison=partial(_poison, rows, slots),
    )


def back_up_kv(
    original: Callable[..., None],
    self: Any,
    device_pool: Any,
    host_indices: torch.Tensor,
    device_indices: torch.Tensor,
    *args: Any,
    **options: Any,
) -> None:
    """Launch the copy of all layers' KV to the host as an operation. Runs around the copy; indices
    are int64 ``[tokens]``."""
    host, slots = _numbers(host_indices), _numbers(device_indices)
    _device().launch(
        "backup of KV",
        partial(original, self, device_pool, host_indices, device_indices, *args, **options),
        reads=[(SLOTS, slots)],
        writes=[(HOST_SLOTS, host)],
        poison=partial(_poison, _host_rows(self), host),
    )


def poison_freed_slots(self: Any, free_index: torch.Tensor) -> None:
    """Poison freed slots, int64 ``[slots]``. Runs before ``free`` of the allocator of slots."""
    _poison_freed_on_device(self, _numbers(free_index))


def poison_freed_pages(self: Any, *page_ids: torch.Tensor) -> None:
    """Poison freed pages, int64 ``[pages]`` each. Runs before the page allocator frees them."""
    for pages in page_ids:
        slots = _numbers(pages)[:, None] * self.page_size + np.arange(self.page_size)
        _poison_freed_on_device(self, slots.reshape(-1))


def poison_freed_host_slots(self: Any, indices: torch.Tensor) -> None:
    """Poison freed host slots, int64 ``[tokens]``. Runs before ``free`` of HiCache's host pool."""
    _device().host_writes("reuse of host memory", HOST_SLOTS, _numbers(indices))
    _poison(_host_rows(self), _device().idle(HOST_SLOTS, _numbers(indices)))


def run_forward(
    original: Callable[..., ModelRunnerOutput],
    self: ModelRunner,
    forward_batch: ForwardBatch,
    *args: Any,
    **options: Any,
) -> ModelRunnerOutput:
    """Launch a forward pass as an operation, which may run later and then fills in the returned
    logits. Runs around ``ModelRunner.forward``."""
    device, found = _device(), []
    # Logits to be filled in; None until the first batch has shown their shape and dtype.
    like = getattr(self, "elora_logits_like", None)
    if forward_batch.forward_mode.is_target_verify():
        like = None  # it has logits of several tokens per request, which the host reads next
    later = None if like is None else like.new_empty(forward_batch.batch_size, like.shape[1])
    restored = _kept(self, forward_batch)

    def run() -> None:
        with restored():
            found.append(original(self, forward_batch, *args, **options))
        if later is not None:
            later.copy_(found[0].logits_output.next_token_logits)

    if forward_batch.forward_mode.is_decode():
        # As with decode graphs, the scheduler may continue once the inputs have been read.
        self.shared_read_done_event = torch.cpu.current_stream().record_event()
    reads, writes = _slots_of(self, forward_batch)
    device.launch("forward pass", run, reads=reads, writes=writes, is_forward=True)
    if not found and (later is None or not _is_plain(forward_batch)):
        device.force(device.stream.last)
    if found:
        logits = getattr(found[0].logits_output, "next_token_logits", None)
        if logits is not None:
            self.elora_logits_like = logits[:0]
        return found[0]
    return _output(later)


def run_sampling(
    original: Callable[..., torch.Tensor],
    self: ModelRunner,
    logits_output: Any,
    forward_batch: ForwardBatch,
) -> torch.Tensor:
    """Launch sampling after the forward pass as an operation. Wraps ``ModelRunner.sample``."""
    device, found = _device(), []
    like = getattr(self, "elora_ids_like", None)
    later = None if like is None else like.new_zeros(forward_batch.batch_size)

    def run() -> None:
        found.append(original(self, logits_output, forward_batch))
        if later is not None:
            later.copy_(found[0])

    device.launch("sampling", run, is_forward=True)
    if not found and (later is None or not _is_plain(forward_batch)):
        device.force(device.stream.last)
    if found:
        self.elora_ids_like = found[0][:0]
        return found[0]
    assert later is not None
    return later


def relay_tokens(original: Callable[..., None], *args: Any) -> None:
    """Launch the relay of sampled tokens to the next batch. Runs around ``FutureMap.stash``."""
    _device().launch("relay of tokens", partial(original, *args), is_forward=True)


def finish_batch_before(batch: Any, future_map: Any) -> None:
    """Run all operations queued on the current stream. Runs before ``resolve_forward_inputs``,
    whose first step is on the forward stream."""
    device = _device()
    device.force(device.stream.last)


def add_statistics(result: Any, self: Scheduler, recv_req: Any) -> Any:
    """Add counts of the checked operations to ELORA's statistics. Runs after
    ``Scheduler.get_internal_state``."""
    device = _device()
    result.internal_state["elora"] |= {
        "stream_operations": device.num_operations,
        "stream_operations_delayed": device.num_delayed,
        "stream_orders_checked": device.races.num_checked,
    }
    return result


def _device() -> AsyncDevice:
    stream: Any = torch.cpu.current_stream()
    device: AsyncDevice = stream.device_
    return device


def _kept(runner: ModelRunner, batch: ForwardBatch) -> Callable[[], Any]:
    """Capture the state that a launch of kernels reads, so that a delayed forward pass sees the
    state of its launch. Returns a context manager that restores it.

    This includes the rows of its requests and their slots in the pool of sliding windows, which a
    decode graph has read when the scheduler continues.
    """
    backend = getattr(runner.lora_manager, "lora_backend", None)
    counter = getattr(runner.token_to_kv_pool, "layer_transfer_counter", None)
    owners = [(backend, ("batch_info", "_awaited")), (counter, ("consumer_index", "events"))]
    names = [(owner, name) for owner, its in owners for name in its if hasattr(owner, name)]
    rows, requests = runner.req_to_token_pool.req_to_token, batch.req_pool_indices.clone()
    windows = getattr(runner.token_to_kv_pool, "full_to_swa_index_mapping", rows[:0])

    def look() -> tuple[list[Any], torch.Tensor, torch.Tensor]:
        return [getattr(owner, name) for owner, name in names], rows[requests], windows.clone()

    def put_back(values: list[Any], own_rows: torch.Tensor, own_windows: torch.Tensor) -> None:
        for (owner, name), value in zip(names, values, strict=True):
            setattr(owner, name, value)
        rows[requests] = own_rows
        windows.copy_(own_windows)

    kept = look()
    kept = ([_as_recorded(value, counter) for value in kept[0]], *kept[1:])

    @contextmanager
    def restored() -> Iterator[None]:
        now = look()
        put_back(*kept)
        try:
            yield
        finally:
            put_back(*now)

    return restored


def _as_recorded(value: Any, counter: Any) -> Any:
    """A copy of the current events of KV loads, because later loads record the same events."""
    if counter is None or value is not counter.events or counter.consumer_index < 0:
        return value
    kept, awaited = list(value), copy(value[counter.consumer_index])
    awaited.load_events = [copy(event) for event in awaited.load_events]
    kept[counter.consumer_index] = awaited
    return kept


def _is_plain(batch: ForwardBatch) -> bool:
    """Whether the scheduler needs only the tokens of the batch's output."""
    sampling = batch.sampling_info
    return not (
        batch.return_logprob
        or batch.capture_hidden_mode.need_capture()
        or (sampling is not None and sampling.grammars is not None)
    )


def _slots_of(
    runner: ModelRunner, batch: ForwardBatch
) -> tuple[Sequence[Access], Sequence[Access]]:
    """Slots that a forward pass reads, including those of its adapters, and slots it writes."""
    rows = runner.req_to_token_pool.req_to_token
    reads = [
        _numbers(rows[request, :length])
        for request, length in zip(
            batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True
        )
    ]
    residency = getattr(runner.lora_manager, "residency", None)
    if residency is not None:
        adapters = set(batch.lora_ids or ()) - {None}
        reads += [_numbers(residency.core.node_of(adapter_id).slots) for adapter_id in adapters]
    read = np.unique(np.concatenate(reads)) if reads else np.empty(0, np.int64)
    pool, written = runner.token_to_kv_pool, _numbers(batch.out_cache_loc)
    if getattr(pool, "full_to_swa_index_mapping", None) is None:
        return [(SLOTS, read[read > 0])], [(SLOTS, written)]
    windows = _numbers(pool.full_to_swa_index_mapping)
    read_there = windows[read]
    return (
        [(SLOTS, read[read > 0]), (WINDOW_SLOTS, read_there[read_there > 0])],
        [(SLOTS, written), (WINDOW_SLOTS, windows[written])],
    )


def _output(logits: torch.Tensor | None) -> ModelRunnerOutput:
    # Importing the model runner makes SGLang choose its backends, too early at module import.
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.model_executor.model_runner import ModelRunnerOutput

    return ModelRunnerOutput(LogitsProcessorOutput(logits), can_run_graph=False)


def _blocks_of(arena: HostArena | None, memory: torch.Tensor) -> Blocks:
    """Numbers of the arena's blocks that a uint8 tensor lies in; empty if outside the arena."""
    start = -1 if arena is None else memory.data_ptr() - arena._memory.data_ptr()
    if arena is None or not 0 <= start < len(arena._memory):
        return np.empty(0, np.int64)
    first, end = start // arena.block_bytes, -(-(start + len(memory)) // arena.block_bytes)
    return np.arange(first, end, dtype=np.int64)


def _numbers(indices: torch.Tensor) -> Blocks:
    numbers: Blocks = indices.detach().to(torch.int64).numpy().copy()
    return numbers


def _host_rows(pool: Any) -> list[torch.Tensor]:
    assert pool.layout == "layer_first", pool.layout
    has_one_plane = pool.kv_buffer.dim() == 4  # [layers, slots, heads, elements]
    planes = [pool.kv_buffer] if has_one_plane else pool.kv_buffer
    return [plane[layer] for plane in planes for layer in range(pool.layer_num)]


def _planes_of(pool: Any) -> Sequence[Sequence[torch.Tensor]]:
    # SGLang's pools are not imported before it has chosen its backends.
    from sglang_elora.srt.mem_cache.kv_pool import buffers_of

    return buffers_of(pool)


def _poison_freed_on_device(allocator: Any, slots: Blocks) -> None:
    pool = allocator.get_kvcache()
    rows = [tensor for plane in _planes_of(pool) for tensor in plane]
    has_windows = getattr(pool, "allocation_label", None) == "SWA"
    _poison(rows, _device().idle(WINDOW_SLOTS if has_windows else SLOTS, slots))


def _poison(rows: list[torch.Tensor], slots: Blocks) -> None:
    """Fill these slots of each tensor ``[slots, ...]`` with ``_POISON``."""
    index = torch.from_numpy(slots)
    for tensor in rows:
        tensor.view(len(tensor), -1).view(torch.uint8)[index] = _POISON
