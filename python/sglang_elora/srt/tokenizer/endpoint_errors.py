"""Hook bodies for endpoints that answer some requests with HTTP 500, or not at all."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson
from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput
from starlette.responses import JSONResponse, StreamingResponse

if TYPE_CHECKING:
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
    from sglang.srt.entrypoints.openai.protocol import DetokenizeRequest
    from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingDetokenize
    from sglang.srt.entrypoints.openai.serving_transcription import OpenAIServingTranscription
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)


async def check_tokens(
    original: Callable[..., Awaitable[Any]],
    self: OpenAIServingDetokenize,
    adapted_request: DetokenizeRequest,
    request: DetokenizeRequest,
    raw_request: Any,
) -> Any:
    """Check that tokens are in the vocabulary, which the tokenizer does not check. Runs around
    ``OpenAIServingDetokenize._handle_non_streaming_request``.

    Raises:
        ValueError: A token is not (SGLang answers HTTP 400).
    """
    manager = self.tokenizer_manager
    most = max(manager.model_config.vocab_size, len(manager.tokenizer))
    for given in request.tokens:
        for token in given if isinstance(given, list) else [given]:
            if isinstance(token, int) and not 0 <= token < most:
                raise ValueError(f"tokens has the token {token}; valid range is [0, {most})")
    return await original(self, adapted_request, request, raw_request)


def refuse_audio(self: OpenAIServingTranscription, *_: Any, **__: Any) -> None:
    """Refuse audio for a model without it. Runs before
    ``OpenAIServingTranscription._convert_to_internal_request``, which uses Whisper's parameters for
    unknown models.

    Raises:
        ValueError: The model takes no audio (SGLang answers HTTP 400).
    """
    if not self.tokenizer_manager.model_config.is_audio_understandable_model:
        raise ValueError("the model takes no audio")


async def blame_the_messages(
    original: Callable[..., Awaitable[JSONResponse]], self: AnthropicServing, *given: Any
) -> JSONResponse:
    """Answer HTTP 400 instead of 500. Runs around ``AnthropicServing.handle_count_tokens``, which
    only renders and tokenizes messages, so a failure is caused by the client's input."""
    response = await original(self, *given)
    if response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
        return response
    refusal: JSONResponse = self._error_response(
        status_code=HTTPStatus.BAD_REQUEST,
        error_type="invalid_request_error",
        message="the messages cannot be rendered by the chat template",
    )
    return refusal


async def end_with_the_error(
    original: Callable[..., Awaitable[StreamingResponse]], self: Any, *given: Any
) -> StreamingResponse:
    """Send the error as the last line of a stream, as Ollama does. Runs around ``OllamaServing``'s
    streams, which end without an error when the request is refused."""
    response = await original(self, *given)
    chunks = response.body_iterator

    async def with_the_error() -> AsyncIterator[Any]:
        try:
            async for chunk in chunks:
                yield chunk
        except ValueError as error:
            logger.warning("a stream ended: %s", error)
            yield orjson.dumps({"error": str(error)}) + b"\n"

    response.body_iterator = with_the_error()
    return response


async def run_what_is_aborted(
    original: Callable[..., Awaitable[None]], self: TokenizerManager, obj: PauseGenerationReqInput
) -> None:
    """Continue generation before a pause with mode ``abort``. Runs around
    ``TokenizerManager.pause_generation``, which in that mode waits until all requests have ended.
    Requests held by an earlier pause cannot end, and ``continue_generation`` would wait for the
    pause."""
    if obj.mode == "abort":
        await self._async_dispatch_to_scheduler(ContinueGenerationReqInput(torch_empty_cache=False))
    await original(self, obj)
