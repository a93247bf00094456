"""One adapter on the device, as the LoRA backend reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_elora.kernels import MISSING, adapter_record
from sglang_elora.pages.layout import AdapterLayout
from sglang_elora.pages.planes import KVPlanes, SlotTable, StridedRows
from sglang_elora.pages.vocabulary import OUTSIDE_LAYERS

_A = -1  # in place of a part of B
_Matrix = tuple[str, int]  # module, part; part 0 of a module with experts is all of its B


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a matrix lies in the adapter's addresses."""

    plane: int
    rows: StridedRows
    width: int


class _Copy:
    """A copy of one layer's matrices in one plane that are not views of the pool.

    The same ones are copied in every layer. The memory, and the views of it, are kept until
    ``free``.

    Args:
        slots: All their slots, in the order of the adapter's addresses.
        places: Per matrix its place, and where it begins in the copy.
    """

    def __init__(
        self, slots: torch.Tensor, places: Mapping[_Matrix, tuple[_Place, int]], planes: KVPlanes
    ) -> None:
        self.slots = slots
        self._places = places
        self._planes = planes
        self._memory: torch.Tensor | None = None
        self._views: dict[_Matrix, torch.Tensor] = {}
        self._layer: int | None = None  # the layer that it holds

    def __contains__(self, matrix: _Matrix) -> bool:
        return matrix in self._places

    def view(self, plane: int, layer: int, matrix: _Matrix) -> torch.Tensor:
        """One matrix of this layer, valid until another layer is asked for."""
        if self._layer != layer:
            self._memory = self._planes.gather(plane, layer, self.slots, self._memory)
            self._layer = layer
        kept = self._views.get(matrix)
        if kept is None:
            assert self._memory is not None
            place, offset = self._places[matrix]
            shape, strides = (place.rows.count, place.width), (place.rows.stride, 1)
            kept = self._views[matrix] = self._memory.as_strided(shape, strides, offset)
        return kept

    def forget(self) -> None:
        self._layer = None

    def free(self) -> None:
        self._memory, self._layer = None, None
        self._views.clear()


class PagedAdapter:
    """Matrices of an adapter whose weights are in its slots.

    Valid until those slots are freed. Matrices in consecutive slots are views of the pool. The
    others of a layer are gathered into one copy per plane, which is valid until another layer is
    asked for or ``forget_copies``. The embedding and the output layer have copies of their own:
    they are read before and after all layers.
    """

    def __init__(
        self, layout: AdapterLayout, table: SlotTable, planes: KVPlanes, scaling: float
    ) -> None:
        self.rank = layout.rank
        self.scaling = scaling
        self._places = layout.places
        self._parts_of_experts = {  # by module with experts
            name: len(place.shape.out_features)
            for name, place in layout.places.items()
            if place.shape.num_experts > 1
        }
        self._table = table
        self._planes = planes
        self._records: dict[tuple[str, ...], NDArray[np.int32]] = {}
        self._views: dict[tuple[int, _Matrix], torch.Tensor] = {}
        self._copies: dict[tuple[int, str | None], _Copy] = {}  # by plane and module outside layers

    def record(self, modules: tuple[str, ...]) -> NDArray[np.int32]:
        """The adapter's record for the kernels, with the modules' offsets in the given order."""
        if modules not in self._records:
            offsets = [
                (place.a_offset, place.b_offsets[0]) if place else (MISSING, MISSING)
                for place in map(self._places.get, modules)
            ]
            self._records[modules] = adapter_record(
                self._table.slots, self.rank, self.scaling, offsets
            )
        return self._records[modules]

    def has(self, module: str) -> bool:
        return module in self._places

    def a(self, layer: int, module: str, expert: int = 0) -> torch.Tensor:
        """A of all parts of one expert: ``[parts * rank, in_features]``."""
        rows = self._matrix(layer, (module, _A))
        if module not in self._parts_of_experts:
            return rows
        num_rows = self._parts_of_experts[module] * self.rank
        return rows[expert * num_rows : (expert + 1) * num_rows]

    def b(self, layer: int, module: str, part: int, expert: int = 0) -> torch.Tensor:
        """B of one part of one expert, transposed: ``[rank, out_features[part]]``."""
        if module not in self._parts_of_experts:
            return self._matrix(layer, (module, part))
        block = expert * self._parts_of_experts[module] + part
        return self._matrix(layer, (module, 0))[block * self.rank : (block + 1) * self.rank]

    def a_columns(self, layer: int, module: str, columns: torch.Tensor) -> torch.Tensor:
        """Some columns of A, read from the pool: ``[len(columns), rank]``.

        Args:
            columns: int64, on the pool's device.
        """
        place = self._places[module]
        rows = torch.arange(place.a_rows, device=columns.device) * place.a_stride
        addresses = columns[:, None] + (place.a_offset + rows)
        return self._planes.elements(place.a_plane, layer, self._table, addresses)

    def forget_copies(self, *, free: bool = False) -> None:
        """Read the pool again in the next forward pass. Call between forward passes.

        Args:
            free: Also free the memory of the copies.
        """
        for copy in self._copies.values():
            if free:
                copy.free()
            else:
                copy.forget()

    def _matrix(self, layer: int, matrix: _Matrix) -> torch.Tensor:
        kept = self._views.get((layer, matrix))
        if kept is not None:
            return kept
        own = self._places[matrix[0]]
        plane = own.a_plane if matrix[1] == _A else own.b_plane
        key = plane, _outside(matrix)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = self._copy_of(*key)
        if matrix in copy:
            return copy.view(plane, layer, matrix)
        place = self._place(matrix)
        view = self._planes.view(plane, layer, self._table, place.rows)
        return self._views.setdefault((layer, matrix), view[:, : place.width])

    def _place(self, matrix: _Matrix) -> _Place:
        module, part = matrix
        place = self._places[module]
        if part == _A:
            rows = StridedRows(place.a_offset, place.a_rows, place.a_stride)
            return _Place(place.a_plane, rows, place.shape.in_features)
        num_rows, num_experts = place.rank, place.shape.num_experts
        if num_experts > 1:  # those of all parts, which have one size
            num_rows *= num_experts * len(place.shape.out_features)
        rows = StridedRows(place.b_offsets[part], num_rows, place.b_stride(part))
        return _Place(place.b_plane, rows, place.shape.out_features[part])

    def _matrices(self) -> Iterator[_Matrix]:
        for module, place in self._places.items():
            num_matrices = 1 if place.shape.num_experts > 1 else len(place.b_offsets)
            for part in (_A, *range(num_matrices)):
                yield module, part

    def _copy_of(self, plane: int, outside: str | None) -> _Copy:
        """A copy of the matrices of a plane whose slots are not consecutive: those of a module
        outside the layers, or of all others."""
        scattered: dict[_Matrix, tuple[_Place, int, int]] = {}  # first slot, element in it
        is_copied = np.zeros(len(self._table), np.bool_)
        for matrix in self._matrices():
            if _outside(matrix) != outside:
                continue
            place = self._place(matrix)
            first, end, shift = self._planes.slots_of(place.rows)
            if place.plane == plane and self._table.run(first, end) is None:
                is_copied[first:end] = True
                scattered[matrix] = place, first, shift
        position = np.cumsum(is_copied) - 1  # of each slot in the copy
        places = {
            matrix: (place, int(position[first]) * self._planes.slot_elems + shift)
            for matrix, (place, first, shift) in scattered.items()
        }
        slots = self._table.slots
        return _Copy(slots[torch.from_numpy(is_copied).to(slots.device)], places, self._planes)


def _outside(matrix: _Matrix) -> str | None:
    """The matrix's module if that is outside the layers."""
    return matrix[0] if matrix[0] in OUTSIDE_LAYERS else None
