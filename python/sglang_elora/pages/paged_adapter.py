"""One adapter on the device, as the LoRA backend reads it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_elora.kernels import MISSING, adapter_record
from sglang_elora.pages.layout import AdapterLayout
from sglang_elora.pages.planes import KVPlanes, SlotTable


class PagedAdapter:
    """Matrices of an adapter whose weights are in its slots.

    Valid until those slots are freed. Views of the pool are cached; copies, which are made if the
    slots are scattered, are not.
    """

    def __init__(
        self, layout: AdapterLayout, table: SlotTable, planes: KVPlanes, scaling: float
    ) -> None:
        self.rank = layout.rank
        self.scaling = scaling
        self._places = layout.places
        self._table = table
        self._planes = planes
        self._records: dict[tuple[str, ...], NDArray[np.int32]] = {}
        self._views: dict[tuple[int, int, int], torch.Tensor] = {}

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

    def a(self, layer: int, module: str) -> torch.Tensor:
        """A of all parts: ``[parts * rank, in_features]``."""
        place = self._places[module]
        rows = self._read(0, layer, place.a_offset, place.a_rows, place.a_stride)
        return rows[:, : place.shape.in_features]

    def b(self, layer: int, module: str, part: int) -> torch.Tensor:
        """B of one part, transposed: ``[rank, out_features[part]]``."""
        place = self._places[module]
        plane = self._planes.num_planes - 1
        offset, stride = place.b_offsets[part], place.b_stride(part)
        rows = self._read(plane, layer, offset, place.rank, stride)
        return rows[:, : place.shape.out_features[part]]

    def _read(self, plane: int, layer: int, offset: int, rows: int, stride: int) -> torch.Tensor:
        key = (plane, layer, offset)
        kept = self._views.get(key)
        if kept is not None:
            return kept
        matrix = self._planes.read(plane, layer, self._table, offset, rows, stride)
        if self._planes.is_view(plane, layer, matrix):
            self._views[key] = matrix
        return matrix
