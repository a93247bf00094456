"""Reading and writing adapter weights in the memory of the KV pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_elora.kernels import Contiguous, PoolPlanes, job_ints, page_copy, reference
from sglang_elora.pages.image import PIECE_BYTES, AdapterImage, Piece


@dataclass(frozen=True, slots=True)
class StridedRows:
    """A matrix in an adapter's addresses: ``count`` rows from ``offset``, ``stride`` elements from
    a row to the next."""

    offset: int
    count: int
    stride: int


class SlotTable:
    """The slots of one adapter, in the order of its addresses.

    Args:
        slots: Integers ``[num_slots]`` on the pool's device. They are copied on the current
            stream, so that the caller may free or change them afterwards.
    """

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots.to(torch.int32, copy=True)

    def __len__(self) -> int:
        return len(self.slots)

    @cached_property
    def _numbers(self) -> list[int]:
        numbers: list[int] = self.slots.tolist()  # waits for the device
        return numbers

    @cached_property
    def _run_ends(self) -> list[int]:
        """Per index, the end (exclusive) of its run of consecutive slot numbers."""
        ends = list(range(1, len(self) + 1))
        for i in reversed(range(len(self) - 1)):
            if self._numbers[i + 1] == self._numbers[i] + 1:
                ends[i] = ends[i + 1]
        return ends

    def run(self, start: int, end: int) -> int | None:
        """The first slot if slots ``start`` to ``end`` (exclusive) are consecutive, else None.

        O(1) except for the first call, which waits for the device. Also None if ``end`` is beyond
        the table: the slots that follow are not the adapter's.
        """
        return self._numbers[start] if end <= self._run_ends[start] else None


class KVPlanes:
    """The KV pool's planes, viewed as rows of slots in elements of the weights' dtype.

    Element ``o`` of an adapter in a plane is in its slot ``o // slot_elems`` at offset
    ``o % slot_elems``. The KV cache may have another dtype: slots are reinterpreted as bytes.

    Args:
        planes: Per plane, per layer: a contiguous tensor ``[slots, ...]``.
        weight_dtype: The adapters' dtype.
        use_kernels: Whether ``write`` copies with a kernel, through a staging buffer. None: only
            if the pool is not in CPU memory.

    Raises:
        ValueError: A tensor is not contiguous, slots differ in size, planes differ in layers, or
            a slot does not hold a whole number of weights.
    """

    def __init__(
        self,
        planes: Sequence[Sequence[torch.Tensor]],
        weight_dtype: torch.dtype,
        *,
        use_kernels: bool | None = None,
    ) -> None:
        sizes = {tensor[0].nbytes for plane in planes for tensor in plane}
        layers = {len(plane) for plane in planes}
        if len(sizes) != 1 or len(layers) != 1:
            raise ValueError(
                f"slots differ between planes or layers: {sorted(sizes)} bytes, "
                f"{sorted(layers)} layers"
            )
        (self.slot_bytes,), (self.num_layers,) = sizes, layers
        if self.slot_bytes % weight_dtype.itemsize:
            raise ValueError(
                f"{weight_dtype} weights do not fill a slot of {self.slot_bytes} bytes"
            )
        for tensor in (tensor for plane in planes for tensor in plane):
            if not tensor.is_contiguous():
                raise ValueError(
                    f"the KV pool is not contiguous: shape {tuple(tensor.shape)} has strides "
                    f"{tensor.stride()}"
                )
        self.weight_dtype = weight_dtype
        self.slot_elems = self.slot_bytes // weight_dtype.itemsize
        self.num_planes = len(planes)
        self._planes = [[self._as_weights(tensor) for tensor in plane] for plane in planes]
        self.device = self._planes[0][0].device
        self._use_kernels = self.device.type != "cpu" if use_kernels is None else use_kernels

    def plane(self, plane: int, layer: int) -> torch.Tensor:
        """View ``[slots, slot_elems]`` in the weights' dtype; plane -1 holds B."""
        return self._planes[plane][layer]

    def write(
        self,
        table: SlotTable,
        image: AdapterImage,
        *,
        before_slots: Callable[[], None] = lambda: None,
        after_piece: Callable[[int, int], None] = lambda end_layer, num_bytes: None,
    ) -> None:
        """Copy an adapter into its slots, all layers and planes, on the current stream.

        Bytes of the last slots beyond the image are not written. On a GPU the image passes through
        a staging buffer of fixed size. The call does not wait for the copies: the image must not
        change before they end, and the next call must be on the same stream or wait for them.
        After ``warm_up`` no device memory is allocated, since the pool may have taken all of it.

        Args:
            before_slots: Called before the first slot is written, to make the stream wait for the
                slots' previous users; the first piece is already being copied to staging.
            after_piece: Called with the number of layers enqueued so far and the piece's bytes.

        Raises:
            ValueError: The image does not fit the table or the pool.
        """
        first_layer = 0
        for piece in image.pieces:
            before = before_slots if first_layer == 0 else lambda: None
            if self._use_kernels:
                self._copy_staged(piece, table, image.plane_bytes, first_layer, before)
            else:
                before()
                self._to_slots(piece.rows(), table, image.plane_bytes, first_layer)
            first_layer += piece.num_layers
            after_piece(first_layer, piece.nbytes)

    def _to_slots(
        self, memory: torch.Tensor, table: SlotTable, plane_bytes: tuple[int, ...], first_layer: int
    ) -> None:
        layers = slice(first_layer, first_layer + len(memory))
        planes = [[rows.view(torch.uint8) for rows in plane[layers]] for plane in self._planes]
        reference.page_copy(planes, memory, table.slots, plane_bytes, to_pool=True)

    def _copy_staged(
        self,
        piece: Piece,
        table: SlotTable,
        plane_bytes: tuple[int, ...],
        first_layer: int,
        before_slots: Callable[[], None],
    ) -> None:
        for i, (start, slots, part_bytes) in enumerate(self._parts(piece, table, plane_bytes)):
            num_layers = piece.num_layers
            staged = self._staging[: num_layers * sum(part_bytes)].view(num_layers, -1)
            piece.copy_to(staged, start)
            if i == 0:
                before_slots()
            self._launch(Contiguous(staged, slots, part_bytes), first_layer)

    def _parts(
        self, piece: Piece, table: SlotTable, plane_bytes: tuple[int, ...]
    ) -> Iterator[tuple[int, torch.Tensor, tuple[int, ...]]]:
        """The piece in parts that fit the staging buffer: (first byte, slots, bytes per plane).

        Only a single layer can be larger than the buffer. Its parts are runs of one plane's slots.
        """
        if piece.nbytes <= PIECE_BYTES:
            yield 0, table.slots, plane_bytes
            return
        num_slots = PIECE_BYTES // self.slot_bytes
        part_bytes, start = num_slots * self.slot_bytes, 0
        for plane, num_bytes in enumerate(plane_bytes):
            for i, begin in enumerate(range(0, num_bytes, part_bytes)):
                own = [0] * self.num_planes
                own[plane] = min(part_bytes, num_bytes - begin)
                slots = table.slots[i * num_slots : (i + 1) * num_slots]
                yield start + begin, slots, tuple(own)
            start += num_bytes

    def _launch(self, copy: Contiguous, first_layer: int) -> None:
        pool, jobs = self.pool_planes, self._jobs
        page_copy(pool, [copy], to_pool=True, first_layer=first_layer, jobs=jobs)

    def warm_up(self) -> None:
        """Allocate the buffers of ``write``, and compile its kernel for the same alignment."""
        if not self._use_kernels:
            return
        nothing = self._staging[: 16 * self.num_layers].view(self.num_layers, 16)[:, :0]
        table = torch.empty(0, dtype=torch.int32, device=self.device)
        self._launch(Contiguous(nothing, table, (0,) * self.num_planes), 0)

    @cached_property
    def pool_planes(self) -> PoolPlanes:
        """The planes of all layers as kernels take them."""
        return PoolPlanes.of(self._planes)

    @cached_property
    def _staging(self) -> torch.Tensor:
        return torch.empty(PIECE_BYTES, dtype=torch.uint8, device=self.device)

    @cached_property
    def _jobs(self) -> torch.Tensor:
        ints = job_ints(self.num_planes)
        return torch.empty(1, ints, dtype=torch.int64, device=self.device)

    def _as_weights(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.view(len(tensor), -1).view(torch.uint8)
        return rows.view(self.weight_dtype)  # [slots, slot_elems]

    def slots_of(self, rows: StridedRows) -> tuple[int, int, int]:
        """First slot of a matrix in its table, end (exclusive), and its first element there."""
        first, shift = divmod(rows.offset, self.slot_elems)
        return first, -(-(rows.offset + rows.count * rows.stride) // self.slot_elems), shift

    def view(self, plane: int, layer: int, table: SlotTable, rows: StridedRows) -> torch.Tensor:
        """A matrix ``[rows.count, rows.stride]`` in the pool.

        Raises:
            ValueError: Its slots are not consecutive.
        """
        first, end, shift = self.slots_of(rows)
        run = table.run(first, end)
        if run is None:
            raise ValueError(f"slots {first} to {end} of the table are not consecutive")
        touched = self._planes[plane][layer][run : run + end - first]
        return touched.view(-1)[shift : shift + rows.count * rows.stride].view(-1, rows.stride)

    def elements(
        self, plane: int, layer: int, table: SlotTable, addresses: torch.Tensor
    ) -> torch.Tensor:
        """Copies of single elements of an adapter, of the shape of ``addresses`` (int64)."""
        slots = table.slots[addresses // self.slot_elems]
        return self._planes[plane][layer][slots, addresses % self.slot_elems]

    def gather(
        self, plane: int, layer: int, slots: torch.Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A flat copy of these slots in one plane of a layer.

        Args:
            slots: Integers ``[num_slots]``.
            memory: An earlier copy of as many slots, which is overwritten.
        """
        source = self._planes[plane][layer]
        if memory is None:
            return source.index_select(0, slots).view(-1)
        torch.index_select(source, 0, slots, out=memory.view(len(slots), -1))
        return memory
