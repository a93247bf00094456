"""Registration of ELORA's LoRA backends as values of ``--lora-backend``."""

from __future__ import annotations

from functools import partial
from typing import Any, get_type_hints

from sglang.srt.lora.backend.lora_registry import register_lora_backend
from sglang.srt.server_args import ServerArgs

from sglang_elora.srt.lora.lora_backend import TORCH, TRITON


def register_backends(max_adapters: int) -> None:
    """Register ``--lora-backend elora_torch`` and ``elora_triton``. Call once per process.

    Args:
        max_adapters: ``--elora-max-adapters-per-batch``.
    """

    def torch_backend() -> Any:
        from sglang_elora.srt.lora.torch_backend import EloraTorchBackend

        return partial(EloraTorchBackend, max_adapters=max_adapters)

    def triton_backend() -> Any:
        from sglang_elora.srt.lora.triton_backend import EloraTritonBackend

        return partial(EloraTritonBackend, max_adapters=max_adapters)

    register_lora_backend(TORCH)(torch_backend)
    register_lora_backend(TRITON)(triton_backend)
    _flag_choices().extend((TORCH, TRITON))


def _flag_choices() -> list[str]:
    """The list of valid values of ``--lora-backend``. SGLang has ``add_*_choices`` functions for
    similar flags, but not for this one."""
    (argument,) = get_type_hints(ServerArgs, include_extras=True)["lora_backend"].__metadata__
    choices: list[str] = argument.choices
    return choices
