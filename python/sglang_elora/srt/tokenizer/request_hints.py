"""Hook bodies that set up the control channel in the tokenizer process and announce requests."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from sglang.srt.runtime_context import get_parallel

from sglang_elora.srt.orders import hear_failures
from sglang_elora.srt.tokenizer import memory_release
from sglang_elora.srt.tokenizer.endpoints import add_endpoints
from sglang_elora.srt.tokenizer.kv_hints import adapters_named
from sglang_elora.srt.tokenizer.named_adapters import adapter_of
from sglang_elora.srt.tokenizer.session_names import name_native_session, name_openai_session
from sglang_elora.srt.tokenizer.tokenizer_control import TokenizerControl

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

_HTTP_SERVER = "sglang.srt.entrypoints.http_server"


def attach(result: None, self: TokenizerManager) -> None:
    """Create the control channel and its endpoints. Runs after
    ``TokenizerManager.init_request_dispatcher``, when the HTTP app (if any) exists but takes no
    requests yet. The app of a tokenizer worker has been started by then (``worker_app``)."""
    hear_failures(self)
    self.elora_workers.add_to(self._result_dispatcher)
    memory_release.share(self)
    if not self.enable_lora:
        return
    if get_parallel().dp_size > 1:
        logger.warning(
            "hints and /elora/* are off: replicas of one server (--dp-size) need a router"
        )
        return
    control = self.elora = TokenizerControl(self)
    control.add_to(self._result_dispatcher)
    http = sys.modules.get(_HTTP_SERVER)
    if http is not None:
        add_endpoints(http.app, control)


def announce_openai(self: OpenAIServingBase, request: Any, raw_request: Any) -> None:
    """Name the session of an OpenAI request, and announce it and its adapter. Runs before
    ``OpenAIServingBase.handle_request``, which renders and tokenizes before the request reaches the
    tokenizer manager."""
    name_openai_session(request, raw_request)
    control: TokenizerControl | None = getattr(self.tokenizer_manager, "elora", None)
    if control is not None:
        control.announce(adapter_of(self, request), getattr(request, "session_id", None))


def announce_native(self: TokenizerManager, obj: Any) -> None:
    """Name the session of a request; announce it, its adapter and its ``kv_hints``. Runs before
    ``TokenizerManager._validate_and_resolve_lora``. A request without text to tokenize reaches the
    scheduler at once, so its own adapter is not announced.

    Raises:
        ValueError: ``kv_hints`` is malformed.
    """
    name_native_session(obj)
    control: TokenizerControl | None = getattr(self, "elora", None)
    if control is None:
        return
    if getattr(obj, "text", None) is not None:
        control.announce(obj.lora_path, getattr(obj, "session_id", None))
    if (hints := getattr(obj, "kv_hints", None)) is not None:
        control.announce(adapters_named(hints))
