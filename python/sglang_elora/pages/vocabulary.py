"""How an adapter's weights for the whole vocabulary are spread over its pages.

The embedding (``embed_tokens``) and the output layer (``lm_head``) are as large as a few decoder
layers, and an adapter's pages have room for the same matrices in every layer. So each layer has a
part of the vocabulary: some columns of the embedding's A, some rows of the output layer's B. The
other matrix is copied to every layer, and the first layer's copy is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from sglang_elora.pages.layout import ModuleShape, padded

EMBEDDING, OUTPUT_LAYER = "embed_tokens", "lm_head"
"""SGLang's names of the modules."""
OUTSIDE_LAYERS = frozenset({EMBEDDING, OUTPUT_LAYER})


@dataclass(frozen=True, slots=True)
class VocabularyModule:
    """The embedding or the output layer on one tensor-parallel rank, and its parts.

    Args:
        name: ``EMBEDDING`` or ``OUTPUT_LAYER``.
        hidden_size: Elements of a hidden state.
        vocab_size: Tokens that it has weights for; the last layers have fewer or none.
        num_layers: Decoder layers.
    """

    name: str
    hidden_size: int
    vocab_size: int
    num_layers: int

    @property
    def part_size(self) -> int:
        """Tokens of a layer's part, whole tiles."""
        return padded(-(-self.vocab_size // self.num_layers))

    @property
    def shape(self) -> ModuleShape:
        """Shape of one layer's part."""
        if self.name == EMBEDDING:
            return ModuleShape(EMBEDDING, self.part_size, (self.hidden_size,))
        return ModuleShape(OUTPUT_LAYER, self.hidden_size, (self.part_size,))

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(first token, last + 1) of each layer's part, without layers that have none."""
        starts = range(0, self.vocab_size, self.part_size)
        return tuple((start, min(start + self.part_size, self.vocab_size)) for start in starts)

    def part_of(
        self, layer: int, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they are stored in a layer; zeros after the last token.

        Args:
            a: ``[rank, vocab_size]`` of the embedding, ``[rank, hidden_size]`` of the output layer.
            b: ``[hidden_size, rank]`` of the embedding, ``[vocab_size, rank]`` of the output layer.
        """
        tokens = slice(layer * self.part_size, (layer + 1) * self.part_size)
        if self.name == EMBEDDING:
            part = a[:, tokens]
            return pad(part, (0, self.part_size - part.shape[1])), b
        part = b[tokens]
        return a, pad(part, (0, 0, 0, self.part_size - len(part)))
