"""Hook bodies that check adapters before SGLang sends them to the schedulers."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterReqInput,
    LoadLoRAAdapterReqOutput,
    LoRAUpdateOutput,
)
from sglang.srt.runtime_context import get_lora, get_model, get_parallel

from sglang_elora.adapters import (
    AdapterError,
    AdapterFacts,
    BaseShapes,
    Refusals,
    check_adapter,
    check_tensors,
    download,
    is_factor,
    is_url,
    one_rank_config,
    one_rank_tensors,
)
from sglang_elora.config import active_config
from sglang_elora.srt.tokenizer.adapter_sources import (
    allowed_sources,
    keep_loaded,
    refusal,
    source_calls,
)
from sglang_elora.srt.tokenizer.source_calls import Call, SourceUnavailable

if TYPE_CHECKING:
    import torch
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

_REFUSALS = Refusals()
_Load = Callable[..., Awaitable[LoadLoRAAdapterReqOutput]]


def drop_bad_start_adapters(result: None, server_args: Any) -> None:
    """Drop adapters of --lora-paths that cannot be served. Runs after ``check_lora_server_args``.

    Only the headers of their files are read; weights are checked when they are first read.

    Raises:
        AdapterError: One cannot be served, and ``--elora-bad-adapter exit`` is set.
        ValueError: None can be served, and the flags do not give the rank and modules of later
            ones.
    """
    allowed_sources()  # raises if the flag is invalid
    settings = resolving_view(server_args)
    if not settings.enable_lora or not settings.lora_paths:
        return
    config = active_config()
    kept = []
    for adapter in settings.lora_paths:
        try:
            name, path = adapter.lora_name, adapter.lora_path
            folder = _check(name, path, settings, settings, read_weights=False)
            kept.append(_at(adapter, folder) if is_url(path) else adapter)
        except AdapterError as error:
            if config.bad_adapter == "exit":
                raise
            logger.error("Not served: %s", error)
    if not kept and not (settings.max_lora_rank and settings.lora_target_modules):
        raise ValueError(
            "no adapter of --lora-paths can be served (reasons above); to start without any, "
            "give --max-lora-rank and --lora-target-modules"
        )
    if kept != settings.lora_paths:
        declare_resolution(server_args, "sglang_elora", lora_paths=kept)


async def check_before_load(
    original: _Load, self: TokenizerManager, obj: LoadLoRAAdapterReqInput, _: Any = None
) -> LoadLoRAAdapterReqOutput:
    """Refuse adapters that cannot be served, and name the adapter in every error. Runs around
    ``load_lora_adapter``.

    SGLang gets a local folder. When it loads an adapter again, a URL is requested again.
    """
    name, path = obj.lora_name, obj.lora_path
    if get_lora().enable_lora:
        if problem := await asyncio.to_thread(refusal, path):
            error = f"LoRA adapter {name!r} ({path}): {problem}."
            return LoadLoRAAdapterReqOutput(success=False, error_message=error)
        try:
            if is_url(path):
                folder = await source_calls().call(Call.FETCH, path, download, name, path)
                obj.lora_path = str(folder)
            await asyncio.to_thread(_check, name, obj.lora_path, get_model(), get_lora())
        except (AdapterError, SourceUnavailable) as error:
            text = str(error)
            if isinstance(error, SourceUnavailable):
                text = f"LoRA adapter {name!r} ({path}): {text}"
            return LoadLoRAAdapterReqOutput(success=False, error_message=text)
    output = await original(self, obj, _)
    if output.success and is_url(path):
        async with self.lora_update_lock:
            if ref := self.lora_ref_cache.get(name):
                self.lora_ref_cache[name] = msgspec.structs.replace(ref, lora_path=path)
    keep_loaded(self)
    if not output.success and path not in (output.error_message or ""):
        output.error_message = f"LoRA adapter '{name}' ({path}): {output.error_message}"
    return output


def check_before_load_from_tensors(
    original: Callable[..., LoRAUpdateOutput],
    self: LoRAManager,
    lora_ref: LoRARef,
    tensors: Mapping[str, torch.Tensor],
    config_dict: Mapping[str, Any],
    *rest: Any,
) -> LoRAUpdateOutput:
    """Check the tensors of an adapter. Runs around ``LoRAManager.load_lora_adapter_from_tensors``
    in each scheduler."""
    name, base, limits = lora_ref.lora_name or "", _base_of(get_model()), _limits_of(get_lora())
    try:
        facts = check_tensors(name, config_dict, tensors, base, **limits)
    except AdapterError as error:
        return self.create_lora_update_result(success=False, error_message=str(error))
    _warn_of_dropped(facts)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if is_factor(key)}
    tensors = one_rank_tensors(name, config_dict, tensors)
    config_dict = one_rank_config(name, config_dict, shapes)
    return original(self, lora_ref, tensors, config_dict, *rest)


def load_tensors_on_all_ranks(
    original: Callable[..., LoRAUpdateOutput], self: Any, recv_req: Any
) -> LoRAUpdateOutput:
    """Load sent tensors on all ranks or on none. Runs around a scheduler worker's
    ``load_lora_adapter_from_tensors``.

    Each rank gets a payload of its own, which only it can find unreadable.
    """
    manager, problem = self.model_runner.lora_manager, ""
    num_sent, num_ranks = len(recv_req.serialized_named_tensors), get_parallel().tp_size
    if num_sent < num_ranks:
        problem = f"{num_sent} payloads were sent, of one for each of {num_ranks} ranks"
    else:
        try:
            result = original(self, recv_req)
        except Exception as error:
            logger.exception("tensors of LoRA adapter %r cannot be loaded", recv_req.lora_name)
            problem = f"its tensors cannot be read: {error!r:.300}"
    if problem:
        text = f"LoRA adapter {recv_req.lora_name!r}: {problem}"
        result = manager.create_lora_update_result(success=False, error_message=text)
    agreed: LoRAUpdateOutput = manager.agree_on_load(recv_req.to_ref(), result)
    return agreed


def _check(name: str, path: str, model: Any, lora: Any, *, read_weights: bool = True) -> Path:
    base, limits = _base_of(model), _limits_of(lora)
    check = functools.partial(check_adapter, name, path, base, **limits, read_weights=read_weights)
    facts = _REFUSALS.check(name, path, check)
    _warn_of_dropped(facts)
    return facts.folder


def _warn_of_dropped(facts: AdapterFacts) -> None:
    if facts.num_dropped:
        logger.warning(
            "LoRA adapter %r: its %d weights for a vision or audio encoder are not served "
            "(--elora-tower-weights drop)",
            facts.name,
            facts.num_dropped,
        )


def _at(adapter: LoRARef, folder: Path) -> LoRARef:
    """The adapter with a local folder as its path, and SGLang's id for it (equal on all nodes)."""
    name, path = adapter.lora_name or "", str(folder)
    lora_id = LoRARef.deterministic_id(name, path)
    return msgspec.structs.replace(adapter, lora_id=lora_id, lora_path=path)


def _limits_of(lora: Any) -> dict[str, Any]:
    modules = lora.lora_target_modules
    return {
        "max_rank": lora.max_lora_rank,
        "target_modules": set(modules) if modules else None,
        "drops_towers": active_config().tower_weights == "drop",
    }


def _base_of(model: Any) -> BaseShapes:
    return _base_shapes(model.model_path, model.revision, model.trust_remote_code)


@functools.cache
def _base_shapes(model_path: str, revision: str | None, trust_remote_code: bool) -> BaseShapes:
    shapes = BaseShapes.from_pretrained(
        model_path, revision=revision, trust_remote_code=trust_remote_code
    )
    if not shapes.known:
        logger.warning("The shapes of adapters are not checked: %s", shapes.reason)
    return shapes
