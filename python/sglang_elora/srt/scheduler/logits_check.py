"""Hook bodies that end a request whose logits are NaN or infinite, but no other request.

Weights that are finite in their file can overflow in the computation. Sampling kernels do not
handle the resulting NaN logits: on a CPU they raise, on CUDA they may return tokens outside the
vocabulary, and the next batch reads beyond the embedding.
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
"""Token id that the host receives for a row with NaN or infinite logits."""

_MARK = "elora_no_numbers"


def replace_rows_without_numbers(
    self: Any, logits_output: LogitsProcessorOutput, *_: Any, **__: Any
) -> None:
    """Zero and mark rows of logits with NaN or infinity. Runs before ``Sampler.forward``.

    Queued on the stream of the forward pass; does not block the host. Minus infinity is allowed,
    because masks set it.
    """
    logits = logits_output.next_token_logits
    marked = _rows_without_numbers(logits)
    logits.masked_fill_(marked[:, None], 0.0)
    setattr(logits_output, _MARK, marked)


def _rows_without_numbers(logits: torch.Tensor) -> torch.Tensor:
    """Rows with NaN or infinity: float ``[rows, vocabulary]`` -> bool ``[rows]``."""
    return ~(logits.amax(dim=-1) < math.inf)  # ``amax`` propagates NaN


def tell_host_of_marked_rows(
    result: None, self: Any, batch: Any, future_indices: Any, batch_result: Any
) -> None:
    """Replace the tokens of marked rows by ``NO_TOKEN`` in the copy for the host. Runs after
    ``Scheduler._relay_forward_payload``, which has passed valid tokens to the next batch. A
    prefill-only batch is not sampled, so its logits are checked here."""
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
    """Abort a request with ``NO_TOKEN``. Runs around ``Req._check_vocab_boundary_finish``, which
    would report the answer as complete."""
    is_over = original(self, new_accepted_tokens)
    if NO_TOKEN in new_accepted_tokens:
        whose = "the model" if self.lora_id is None else "the model with this LoRA adapter"
        self.finished_reason = FINISH_ABORT(
            f"{whose} computes logits that are NaN or infinite for this prompt: its weights "
            "overflow",
            HTTPStatus.INTERNAL_SERVER_ERROR if self.lora_id is None else HTTPStatus.BAD_REQUEST,
            "InternalServerError" if self.lora_id is None else "BadRequestError",
        )
        self.finished_len = None  # otherwise the output would be cut at the requested length
        self.skip_radix_cache_insert = True  # its KV may be NaN as well
    return is_over
