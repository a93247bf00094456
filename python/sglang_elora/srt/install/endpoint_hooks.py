"""Hooks on SGLang's HTTP endpoints and on the tokenizer manager's functions that they call."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from sglang_elora.srt.install.hook import Hook, When
from sglang_elora.srt.tokenizer import (
    drain,
    endpoint_errors,
    http_guard,
    named_adapters,
    request_hints,
)

ENDPOINT_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._parse_model_parameter",
        ("self", "model"),
        HookType.AROUND,
        named_adapters.parse_model,
        When.ELORA,
        "How a model is named has no registry.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        ("self", "request", "raw_request"),
        HookType.BEFORE,
        named_adapters.note_named,
        When.ELORA,
        "As above.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
        ("self", "request", "raw_request"),
        HookType.BEFORE,
        named_adapters.note_named,
        When.ELORA,
        "As above; this endpoint does not go through handle_request.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        ("self", "request", "raw_request"),
        HookType.BEFORE,
        request_hints.announce_openai,
        When.ELORA,
        "Arrival has no registry, and a chat is rendered and tokenized before the tokenizer "
        "manager hears of it.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.is_ready",
        ("self",),
        HookType.AROUND,
        drain.is_ready,
        When.ELORA,
        "What makes a server unready has no registry.",
    ),
    Hook(
        "sglang.srt.utils.auth.decide_request_auth",
        ("method", "path"),
        HookType.AROUND,
        http_guard.open_page,
        When.ELORA,
        "The endpoints that need no key are a list of prefixes in SGLang's code.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_tokenize.OpenAIServingDetokenize"
        "._handle_non_streaming_request",
        ("self", "adapted_request", "request", "raw_request"),
        HookType.AROUND,
        endpoint_errors.check_tokens,
        When.ELORA,
        "Request validation has no registry.",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_transcription.OpenAIServingTranscription"
        "._convert_to_internal_request",
        ("self", "request", "raw_request"),
        HookType.BEFORE,
        endpoint_errors.refuse_audio,
        When.ELORA,
        "As above.",
    ),
    Hook(
        "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_count_tokens",
        ("self", "request", "raw_request"),
        HookType.AROUND,
        endpoint_errors.blame_the_messages,
        When.ELORA,
        "As above.",
    ),
    *(
        Hook(
            f"sglang.srt.entrypoints.ollama.serving.OllamaServing._stream_{kind}_response",
            ("self", "gen_request", "raw_request"),
            HookType.AROUND,
            endpoint_errors.end_with_the_error,
            When.ELORA,
            "As above, and an error in a stream has no handler.",
        )
        for kind in ("chat", "generate")
    ),
    *(
        Hook(
            f"sglang.srt.managers.{manager}.pause_generation",
            ("self", "obj"),
            HookType.AROUND,
            endpoint_errors.run_what_is_aborted,
            When.ELORA,
            "Modes of a pause have no registry.",
        )
        for manager in (
            "tokenizer_manager.TokenizerManager",
            "multi_tokenizer_mixin.TokenizerWorker",
        )
    ),
)
