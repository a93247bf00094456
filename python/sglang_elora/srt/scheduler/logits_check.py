"""Hook bodies that end a request whose logits are no numbers, and none beside it.

Weights that are finite in their file can overflow where they are used. The row of logits is NaN
then, for which sampling kernels are not made: on a CPU they raise, on CUDA they may return tokens
that do not exist, and the next batch reads beyond the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req

NO_TOKEN = -1
"""In the place of a token for the host, which sees that it is none."""

_MARK = "elora_no_numbers"


def replace_rows_without_numbers(
    self: Any, logits_output: LogitsProcessorOutput, *_: Any, **__: Any
) -> None:
    """Before ``Sampler.forward``: rows with NaN or infinity become zeros, and are marked.

    Queued on the stream of the forward pass; the host waits for nothing. Minus infinity is no
    such value: masks set it.
    """
    logits = logits_output.next_token_logits
    marked = _rows_without_numbers(logits)
    logits.masked_fill_(marked[:, None], 0.0)
    setattr(logits_output, _MARK, marked)


def _rows_without_numbers(logits: torch.Tensor) -> torch.Tensor:
    """float ``[rows, vocabulary]`` -> bool ``[rows]``."""
    return ~(logits.amax(dim=-1) < math.inf)  # the maximum of NaN and more is NaN


def tell_host_of_marked_rows(
    result: None, self: Any, batch: Any, future_indices: Any, batch_result: Any
) -> None:
    """After ``Scheduler._relay_forward_payload``: the next batch has its tokens, any that exist;
    what is copied to the host is ``NO_TOKEN`` for a marked row. A batch of requests that want no
    token was not sampled, so its logits are looked at here."""
    output, tokens = batch_result.logits_output, batch_result.next_token_ids
    marked = getattr(output, _MARK, None)
    logits = getattr(output, "next_token_logits", None)
    if marked is None and logits is not None and batch.is_prefill_only:
        marked = _rows_without_numbers(logits)
    if marked is not None and tokens is not None:
        batch_result.next_token_ids = torch.where(marked, NO_TOKEN, tokens)


def end_with_the_reason(
    original: Callable[..., bool], self: Req, new_accepted_tokens: list[int]
) -> bool:
    """Around ``Req._check_vocab_boundary_finish``, which would say that the answer is complete."""
    is_over = original(self, new_accepted_tokens)
    if NO_TOKEN in new_accepted_tokens:
        whose = "the model" if self.lora_id is None else "the model with this LoRA adapter"
        self.finished_reason = FINISH_ABORT(
            f"{whose} computes logits that are NaN or infinite for this prompt: its weights "
            "overflow",
            HTTPStatus.INTERNAL_SERVER_ERROR if self.lora_id is None else HTTPStatus.BAD_REQUEST,
            "InternalServerError" if self.lora_id is None else "BadRequestError",
        )
        self.finished_len = None  # or an answer of no tokens would be cut to what was asked for
        self.skip_radix_cache_insert = True  # its KV may hold no numbers either
    return is_over
