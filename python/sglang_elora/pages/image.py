"""An adapter's weights as one contiguous copy in host memory, ready to be laid into pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_elora.pages.layout import AdapterLayout

Matrices = Callable[[int, str], tuple[torch.Tensor, torch.Tensor]]
"""(layer, module) -> A ``[parts * rank, in_features]`` and B ``[sum of out_features, rank]``."""


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """One adapter on one tensor-parallel rank.

    ``planes[p]`` is ``[layers, layout.plane_elems[p]]`` of the weights' dtype. ``scaling`` is
    applied between A and B.
    """

    layout: AdapterLayout
    planes: tuple[torch.Tensor, ...]
    scaling: float

    @classmethod
    def build(
        cls,
        layout: AdapterLayout,
        num_layers: int,
        matrices: Matrices,
        dtype: torch.dtype,
        scaling: float,
        *,
        pin_memory: bool = False,
    ) -> AdapterImage:
        """Copy all matrices to their places; padding is zero."""
        planes = tuple(
            torch.zeros(num_layers, elems, dtype=dtype, pin_memory=pin_memory)
            for elems in layout.plane_elems
        )
        for layer in range(num_layers):
            a_plane, b_plane = planes[0][layer], planes[-1][layer]
            for name, place in layout.places.items():
                a, b = matrices(layer, name)
                _put(a_plane, place.a_offset, place.a_stride, a)
                start = 0
                for part, out in enumerate(place.shape.out_features):
                    rows = b[start : start + out].T
                    _put(b_plane, place.b_offsets[part], place.b_stride(part), rows)
                    start += out
                assert a.shape == (place.a_rows, place.shape.in_features), (name, a.shape)
                assert b.shape == (start, place.rank), (name, b.shape)
        return cls(layout, planes, scaling)

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    def digest(self) -> str:
        """Names the content: equal for equal weights, scaling and layout."""
        digest = hashlib.blake2b(repr((self.layout.rank, self.scaling)).encode(), digest_size=16)
        digest.update(repr(dict(self.layout.places)).encode())
        for plane in self.planes:
            digest.update(plane.view(torch.uint8).numpy())
        return digest.hexdigest()


def _put(plane: torch.Tensor, offset: int, stride: int, matrix: torch.Tensor) -> None:
    rows, columns = matrix.shape
    plane[offset : offset + rows * stride].view(rows, stride)[:, :columns] = matrix
