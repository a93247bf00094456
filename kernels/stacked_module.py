"""The shape of one target module, for which kernels are compiled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StackedModule:
    """A linear layer whose output may have parts: three for ``qkv_proj``, two for ``gate_up_proj``.

    The experts of a layer have a block each in A's plane and in B's, one after the other. A block
    holds one expert's matrices as described below; offsets in records are those of expert 0.

    Args:
        index: Position of the module in adapters' records.
        in_features: Elements of an input row.
        out_features: Elements of an output row, per part.
        in_stride: Elements from one row of A to the next. A is ``[parts * rank, in_features]``.
        out_strides: Per part, elements from one row of B's transpose to the next. Parts are
            adjacent, each ``[rank, out_features[part]]``.
        alignment: Common divisor of all offsets and strides of adapters' address spaces, in
            elements.
        num_experts: Experts that have a matrix of their own each; 1 for an ordinary layer.
        swaps_planes: Whether, of two planes, A lies in the second one and B in the first.
    """

    index: int
    in_features: int
    out_features: tuple[int, ...]
    in_stride: int
    out_strides: tuple[int, ...]
    alignment: int
    num_experts: int = 1
    swaps_planes: bool = False

    @property
    def a_plane(self) -> int:
        """Index of A's plane, if there are two."""
        return -1 if self.swaps_planes else 0

    @property
    def b_plane(self) -> int:
        """Index of B's plane, if there are two."""
        return 0 if self.swaps_planes else -1

    @property
    def a_block(self) -> int:
        """Elements of one expert's A per unit of rank."""
        return len(self.out_features) * self.in_stride

    @property
    def b_block(self) -> int:
        """Elements of one expert's B per unit of rank, all parts together."""
        return sum(self.out_strides)

    def inner_width(self, max_rank: int) -> int:
        """Columns of the result of ``lora_shrink``, a multiple of 16. Otherwise Triton would
        compile kernels for each rank separately."""
        return -(-len(self.out_features) * max_rank // 16) * 16
