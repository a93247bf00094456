"""Offsets of an adapter's matrices in its planes; computes numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

from sglang_elora.kernels import StackedModule

TILE = 64
"""Alignment of rows and offsets, in elements: a kernel's tile of a row never straddles two slots if
a slot's elements are a multiple of it too. Raising it pads more."""


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """Sizes of one linear layer on one tensor-parallel rank.

    Args:
        name: SGLang's name of the module, such as ``qkv_proj``; followed by ``@`` and a number if
            it has several shapes, or if a layer of the pool holds it for several of the model
            (``LayerPlan``).
        in_features: Elements of an input row.
        out_features: Elements of an output row, per part: three for ``qkv_proj``, two for
            ``gate_up_proj``, otherwise one.
        num_experts: Experts that have a matrix each; 1 for a layer without experts.
        layers: Layers of the pool that hold it; None: all.
        swaps_planes: Whether, of two planes, A lies in the second one and B in the first.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]
    num_experts: int = 1
    layers: frozenset[int] | None = None
    swaps_planes: bool = False

    def __post_init__(self) -> None:
        sizes = (self.in_features, *self.out_features, len(self.out_features), self.num_experts)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be positive: {self}")
        if self.num_experts > 1 and len(set(self.out_features)) > 1:
            raise ValueError(f"parts of experts must have one size: {self}")

    @property
    def module(self) -> str:
        """SGLang's name of the module."""
        return self.name.partition("@")[0]

    def is_in(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def shares_a_layer(self, other: ModuleShape) -> bool:
        if self.layers is None or other.layers is None:
            return True
        return not self.layers.isdisjoint(other.layers)

    @property
    def a_elems(self) -> int:
        """Elements of A per rank, of all experts and parts, with padding."""
        return self.num_experts * len(self.out_features) * padded(self.in_features)

    @property
    def b_elems(self) -> int:
        """Elements of B per rank, of all experts and parts, with padding."""
        return self.num_experts * sum(map(padded, self.out_features))


@dataclass(frozen=True, slots=True)
class ModuleOffsets:
    """Start offsets of one module's A and B, in elements of their planes.

    A is ``parts * rank`` rows of ``in_features`` elements. B is stored transposed, so that a small
    rank is not padded to a tile: per part ``rank`` rows of that part's ``out_features``. With
    experts there are as many such blocks, one after the other; the offsets are of the first.
    """

    shape: ModuleShape
    rank: int
    a_plane: int
    a_offset: int
    b_plane: int
    b_offsets: tuple[int, ...]

    @property
    def a_rows(self) -> int:
        """Rows of A, of all experts."""
        return self.shape.num_experts * len(self.shape.out_features) * self.rank

    @property
    def a_stride(self) -> int:
        return padded(self.shape.in_features)

    def b_stride(self, part: int) -> int:
        return padded(self.shape.out_features[part])


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Offsets of all modules of one adapter; the same in every layer that holds the module. Modules
    that no layer holds both of may lie at the same addresses.

    ``plane_elems`` are the used elements of each plane: A in the first, B in the second, unless a
    module swaps them; in a single plane (MLA pools) B follows A.
    """

    rank: int
    places: Mapping[str, ModuleOffsets]  # a module the adapter lacks is absent
    plane_elems: tuple[int, ...]

    @classmethod
    def build(cls, rank: int, shapes: Sequence[ModuleShape], num_planes: int = 2) -> AdapterLayout:
        """The layout of modules in the given order.

        Raises:
            ValueError: ``rank`` is not positive, or ``num_planes`` neither 1 nor 2.
        """
        if rank < 1 or num_planes not in (1, 2):
            raise ValueError(f"rank {rank} must be positive and planes {num_planes} be 1 or 2")
        swaps = [num_planes == 2 and shape.swaps_planes for shape in shapes]
        sizes = [
            (shape.b_elems, shape.a_elems) if swap else (shape.a_elems, shape.b_elems)
            for shape, swap in zip(shapes, swaps, strict=True)
        ]
        firsts, first_end = _begins(shapes, [rank * first for first, _ in sizes])
        seconds, second_end = _begins(shapes, [rank * second for _, second in sizes])
        plane, shift = (1, 0) if num_planes == 2 else (0, first_end)
        places = {}
        for shape, swap, first, second in zip(shapes, swaps, firsts, seconds, strict=True):
            a, b = (0, first), (plane, shift + second)
            if swap:
                a, b = b, a
            part_sizes = (rank * padded(out) for out in shape.out_features[:-1])
            b_offsets = tuple(accumulate(part_sizes, initial=b[1]))
            places[shape.name] = ModuleOffsets(shape, rank, *a, b[0], b_offsets)
        ends = (first_end, second_end) if num_planes == 2 else (first_end + second_end,)
        return cls(rank, MappingProxyType(places), ends)

    def num_slots(self, slot_elems: int, page_size: int) -> int:
        """Slots the adapter takes: those of its longest plane, rounded up to whole pages."""
        slots = -(-max(self.plane_elems) // slot_elems)
        return -(-slots // page_size) * page_size


def _begins(shapes: Sequence[ModuleShape], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each module begins, after those before it that some layer has too; and the end of
    all."""
    begins: list[int] = []
    for i, shape in enumerate(shapes):
        ends = (begins[j] + sizes[j] for j in range(i) if shapes[j].shares_a_layer(shape))
        begins.append(max(ends, default=0))
    return begins, max((b + size for b, size in zip(begins, sizes, strict=True)), default=0)


def stacked_modules(shapes: Sequence[ModuleShape]) -> dict[str, StackedModule]:
    """The modules as the kernels' compile-time descriptions, numbered in the given order."""
    strides = {
        shape.name: (padded(shape.in_features), *map(padded, shape.out_features))
        for shape in shapes
    }
    alignment = math.gcd(*(stride for of_module in strides.values() for stride in of_module))
    return {
        shape.name: StackedModule(
            index,
            shape.in_features,
            shape.out_features,
            in_stride=strides[shape.name][0],
            out_strides=strides[shape.name][1:],
            alignment=alignment,
            num_experts=shape.num_experts,
            swaps_planes=shape.swaps_planes,
        )
        for index, shape in enumerate(shapes)
    }


def padded(num_elems: int) -> int:
    """``num_elems`` rounded up to whole tiles."""
    return -(-num_elems // TILE) * TILE
