"""How an adapter's weights for the output layer (``lm_head``) are spread over its pages.

The output layer is as large as a few decoder layers, and an adapter's pages have room for the same
matrices in every layer. So each layer has a part of the vocabulary: B of that part, and a copy of
A, of which the first layer's is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_elora.pages.layout import ModuleShape, padded

OUTPUT_LAYER = "lm_head"
"""SGLang's name of the module."""


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """The output layer on one tensor-parallel rank, and its parts.

    Args:
        in_features: Elements of a hidden state.
        vocab_size: Rows of its weight; the last layers have fewer or none.
        num_layers: Decoder layers.
    """

    in_features: int
    vocab_size: int
    num_layers: int

    @property
    def part_size(self) -> int:
        """Tokens of a layer's part, whole tiles."""
        return padded(-(-self.vocab_size // self.num_layers))

    @property
    def shape(self) -> ModuleShape:
        """Shape of one layer's part."""
        return ModuleShape(OUTPUT_LAYER, self.in_features, (self.part_size,))

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(first token, last + 1) of each layer's part, without layers that have none."""
        starts = range(0, self.vocab_size, self.part_size)
        return tuple((start, min(start + self.part_size, self.vocab_size)) for start in starts)

    def part_of(self, layer: int, b: torch.Tensor) -> torch.Tensor:
        """The rows of B for a layer's part, ``[part_size, rank]``; zeros after the last token.

        Args:
            b: ``[vocab_size, rank]``.
        """
        part = b[layer * self.part_size : (layer + 1) * self.part_size]
        if len(part) == self.part_size:
            return part
        return torch.cat((part, part.new_zeros(self.part_size - len(part), part.shape[1])))
