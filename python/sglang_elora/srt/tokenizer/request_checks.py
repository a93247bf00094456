"""Hook bodies that refuse malformed requests and prevent a request from ending the server."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import AbortReq, EmbeddingReqInput, GenerateReqInput

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

MAX_CHARS = 1024
"""Most characters of a name or key that a client sends. The server stores these, so raising it
lets clients take more memory."""

_PER_PROMPT: dict[str, tuple[type, ...]] = {
    "lora_path": (str,),
    "sampling_params": (dict,),
    "return_logprob": (bool,),
    "logprob_start_len": (int,),
    "top_logprobs_num": (int,),
    "token_ids_logprob": (list,),
    "custom_logit_processor": (str,),
    "extra_key": (str,),
    "cache_salt": (str,),
    "bootstrap_host": (str,),
    "bootstrap_port": (int,),
    "bootstrap_room": (int,),
}
"""Fields with one value (or None) per prompt, and the types of the value."""

_PER_REQUEST: dict[str, type] = {"session_id": str, "priority": int}

_MOST_NUMBER = 2**31 - 1
"""Largest number in a request: the scheduler converts numbers to int32 or float32."""

_LEAST_NUMBER = 2.0**-126  # smallest normal number in float32
_LEAST_NUMBERS = {"temperature": 0, "repetition_penalty": 1e-6}
"""Lower bounds of the two values that logits are divided by. SGLang treats very small temperatures
as 0."""

_NO_TOKENS = "The prompt has no tokens."

_BOUNDED = ("lora_path", "session_id", "extra_key", "cache_salt")


def raise_value_errors(original: Callable[..., None], self: Any) -> None:
    """Convert errors to ``ValueError``. Runs around ``normalize_batch_and_arguments``, whose errors
    are caused by the client's input and would give HTTP 500.

    Raises:
        ValueError: The function raised (SGLang answers HTTP 400).
    """
    try:
        original(self)
    except (AssertionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"malformed request: {error}") from error


def check_shape(result: None, self: GenerateReqInput | EmbeddingReqInput) -> None:
    """Check that fields have one value of the right type per prompt. Runs after
    ``normalize_batch_and_arguments``.

    SGLang turns single values into lists for a batch. It does not check for a list with a single
    prompt, nor the length and the elements of a client's list; the scheduler would then fail in the
    middle of a step.

    Raises:
        ValueError: A field is invalid (SGLang answers HTTP 400).
    """
    for field, types in _PER_PROMPT.items():
        value = getattr(self, field, None)
        if value is None:
            continue
        if self.is_single:
            values = [value]
        elif not isinstance(value, list):
            raise ValueError(f"{field} must be a list, with one value for each prompt")
        else:
            values = value
            wanted = self.batch_size * getattr(self, "parallel_sample_num", 1)
            if len(values) != wanted:
                raise ValueError(f"{field} has {len(values)} values for {wanted} prompts")
        for one in values:
            if one is not None and not isinstance(one, types):
                names = " or ".join(kind.__name__ for kind in types)
                raise ValueError(f"{field} of one prompt must be a {names}, not {_kind(one)}")
            _check_length(field, one)
    for field, kind in _PER_REQUEST.items():
        value = getattr(self, field, None)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{field} must be a {kind.__name__}, not {_kind(value)}")
        _check_length(field, value)


def check_values(self: TokenizerManager, obj: GenerateReqInput | EmbeddingReqInput) -> None:
    """Check that adapters are requested by name and that numbers are in their ranges. Runs before
    ``_validate_and_resolve_lora``.

    ``lora_id`` is SGLang's internal id of a loaded adapter. Sent by a client it would bypass the
    registry, so that the adapter could be unloaded while the request runs. Tokens outside the
    vocabulary end the scheduler in its forward pass, on CUDA by a device-side assertion.

    Raises:
        ValueError: A value is invalid (SGLang answers HTTP 400).
    """
    if obj.lora_id is not None:
        raise ValueError("lora_id is internal to SGLang: name the adapter with lora_path")
    config = self.model_config
    for ids in _of_each_prompt(obj, "input_ids"):
        _check_vocabulary("input_ids has", ids, config.vocab_size)
    for rows in _of_each_prompt(obj, "input_embeds"):
        if any(len(row) != config.hidden_size for row in rows):
            raise ValueError(f"input_embeds must be rows of {config.hidden_size} numbers each")
    for params in _of_each_prompt(obj, "sampling_params"):
        _check_sampling(params or {}, config.vocab_size)
    for field, (least, most) in {
        "top_logprobs_num": (0, config.vocab_size),
        "logprob_start_len": (-1, _MOST_NUMBER),
        "priority": (-_MOST_NUMBER, _MOST_NUMBER),
    }.items():
        given = getattr(obj, field, None)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and not least <= number <= most:
                raise ValueError(f"{field} must be from {least} to {most}, not {number}")


def _of_each_prompt(obj: GenerateReqInput | EmbeddingReqInput, field: str) -> list[Any]:
    given = getattr(obj, field, None)
    if given is None:
        return []
    return [given] if obj.is_single else list(given)


def _check_sampling(params: dict[str, Any], vocab_size: int) -> None:
    """Check the parameters that become tensors in the scheduler. SGLang checks the others, and the
    keys of ``logit_bias``."""
    for name, value in params.items():
        is_number = isinstance(value, (int, float)) and name != "sampling_seed"
        if is_number and not abs(value) <= _MOST_NUMBER:
            raise ValueError(f"{name} must be at most {_MOST_NUMBER}, not {value}")
        least = _LEAST_NUMBERS.get(name, _LEAST_NUMBER)
        if is_number and 0 < abs(value) < least:
            raise ValueError(f"{name} must be 0 or at least {least}, not {value}")
    biases = params.get("logit_bias")
    if biases is not None and not (
        isinstance(biases, dict)
        and all(_is_number(bias) and abs(bias) <= _MOST_NUMBER for bias in biases.values())
    ):
        raise ValueError(f"logit_bias must be numbers from -{_MOST_NUMBER} to {_MOST_NUMBER}")
    ends = params.get("stop_token_ids")
    if ends is None:
        return
    if not isinstance(ends, list) or set(map(type, ends)) - {int}:
        raise ValueError("stop_token_ids must be a list of integers")
    # Tokens outside the vocabulary have no effect, but min_new_tokens would index logits by them.
    params["stop_token_ids"] = [end for end in ends if 0 <= end < vocab_size]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def check_tokens(
    self: TokenizerManager, obj: GenerateReqInput | EmbeddingReqInput, input_ids: list[int] | None
) -> None:
    """Refuse a prompt without tokens, or with tokens that the model has no embedding for: a batch
    of such requests ends the scheduler in its forward pass. Runs before
    ``_validate_one_request``. Multimodal inputs and earlier turns of a session also count as
    tokens. A tokenizer may have more tokens than the model, so texts are checked as well.

    Raises:
        ValueError: The prompt is one of these (SGLang answers HTTP 400).
    """
    if input_ids is None:
        return
    has_mm_input = obj.contains_mm_input()
    if not len(input_ids) and not has_mm_input and not getattr(obj, "session_params", None):
        raise ValueError(_NO_TOKENS)
    # ``check_values`` has checked tokens that a client sent; those of images may lie outside.
    if obj.input_ids is None and not has_mm_input:
        _check_vocabulary("the prompt has", input_ids, self.model_config.vocab_size)


def _check_vocabulary(what: str, ids: Sequence[int], vocab_size: int) -> None:
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(id_ for id_ in ids if not 0 <= id_ < vocab_size)
        raise ValueError(f"{what} the token {wrong}; valid range is [0, {vocab_size})")


def refuse_no_tokens(result: None, self: Scheduler, req: Req) -> None:
    """Abort a request without tokens of any kind. Runs after
    ``Scheduler.init_req_max_new_tokens``."""
    if not req.origin_input_ids:
        req.set_finish_with_abort(_NO_TOKENS)


def refuse_alone(
    original: Callable[..., None], self: Scheduler, recv_req: Any, *rest: Any, **options: Any
) -> None:
    """Fail only the request whose handler raises, instead of ending the scheduler and the server.
    Runs around ``Scheduler.handle_generate_request`` and ``handle_embedding_request``."""
    try:
        original(self, recv_req, *rest, **options)
    except Exception as error:
        logger.exception("request %s failed on arrival", recv_req.rid)
        if any(req.rid == recv_req.rid for req in self.waiting_queue):
            return  # it was queued before the error and will be answered after it has run
        text = f"the request cannot be served: {type(error).__name__}: {error}"
        reason = {"type": "abort", "status_code": HTTPStatus.BAD_REQUEST, "message": text}
        answer = AbortReq(rid=recv_req.rid, finished_reason=reason)
        self.ipc_channels.send_to_tokenizer.send_output(answer, recv_req)


def _check_length(field: str, value: Any) -> None:
    if field in _BOUNDED and isinstance(value, str) and len(value) > MAX_CHARS:
        raise ValueError(f"{field} has {len(value)} characters, of at most {MAX_CHARS}")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
