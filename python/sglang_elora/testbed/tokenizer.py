"""A byte-level BPE tokenizer with a chat template, trained on the seeded corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable
from sglang_elora.testbed.corpus import paragraph, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|end|>"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
SPECIAL_TOKENS = (BEGIN, END, *ROLES)
"""Token ids 0 to 4, in this order."""

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Template that renders content verbatim, so that a conversation's next prompt starts with exactly
the tokens that the server has already processed, and reuses their cached KV."""

_CORPUS_PARAGRAPHS = 1500


def train_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of exactly ``vocab_size`` tokens.

    Raises:
        ValueError: The corpus has too few distinct words for that many tokens, or ``vocab_size``
            is less than the 256 bytes and the special tokens need.
    """
    ensure_torchvision_importable()
    from tokenizers import (  # type: ignore[import-untyped, unused-ignore]
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (paragraph(f"corpus/{seed}/{i}", 8) for i in range(_CORPUS_PARAGRAPHS))
    bpe.train_from_iterator(texts, trainer=trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is out of reach: training gave {bpe.get_vocab_size()} "
            "tokens; choose a size of at least 512 and at most 2048"
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        unk_token=END,  # transformers loads it as Qwen2's, which adds one that has no embedding
        extra_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def speakable_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of tokens that are a space and a whole word, and that decode and encode to themselves.

    A model restricted to these generates words, never ends early, and, because words split at
    spaces, any sequence of them encodes back to itself: an assistant turn in the history yields
    the same tokens again, as does the text of a trained model.
    """
    words = vocabulary()
    speakable = []
    for token_id in range(len(tokenizer)):
        text = str(tokenizer.decode([token_id]))
        is_word = text.startswith(" ") and text[1:] in words
        if is_word and tokenizer.encode(text, add_special_tokens=False) == [token_id]:
            speakable.append(token_id)
    return speakable
