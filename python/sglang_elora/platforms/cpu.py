"""A platform for SGLang that runs the real server on any CPU.

SGLang's own CPU engine needs a compiled kernel library and AMX instructions.
This one is registered as an out-of-tree platform of device type ``cpu``: fused
operators take their native torch forward, attention and LoRA run on their
``torch_native`` backends. It is for development and tests: correct, not fast.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform
from typing_extensions import override

from sglang_elora.platforms.threads import VARIABLE, set_default_threads

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_GPU_ONLY_LORA_BACKENDS = ("csgmv", "triton")


class EloraCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain torch on the CPU, for machines without an accelerator."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    @override
    def get_device(self, device_id: int = 0) -> str:
        """The device as a string, since SGLang splits it at ':'."""
        return "cpu"

    @override
    def init_backend(self) -> None:
        """Install the CPU replacements; SGLang calls this once per worker, when it imports its
        model runner."""
        from sglang_elora.platforms.attention import use_cpu_attention
        from sglang_elora.platforms.experts import use_cpu_experts
        from sglang_elora.platforms.host_memory import use_plain_host_tier, use_plain_memory
        from sglang_elora.platforms.linear_attention import use_torch_linear_attention
        from sglang_elora.platforms.speculative import use_torch_copies
        from sglang_elora.platforms.state_space import use_torch_state_spaces

        use_cpu_attention()
        use_cpu_experts()
        use_plain_memory()
        use_plain_host_tier()
        use_torch_copies()
        use_torch_linear_attention()
        use_torch_state_spaces()

    @override
    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set defaults for a CPU: backends that need no GPU, and threads that leave a core to
        the server's other processes."""
        num_ranks = server_args.tp_size * server_args.dp_size * server_args.pp_size
        threads = set_default_threads(server_args.model_path, num_ranks)
        if threads is not None:
            logger.info("The CPU platform sets %s=%d; set it to choose.", VARIABLE, threads)
        if server_args.dtype == "float32":  # SGLang's default is bfloat16, whatever the model's
            os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")
        if server_args.device is None:
            server_args.device = "cpu"
        if server_args.attention_backend is None:
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.lora_backend in _GPU_ONLY_LORA_BACKENDS:
            logger.info(
                "LoRA backend %r needs a GPU; the CPU platform uses 'torch_native'.",
                server_args.lora_backend,
            )
            server_args.lora_backend = "torch_native"
        server_args.sleep_on_idle = True  # otherwise an idle scheduler occupies a core
        if server_args.enable_hierarchical_cache:
            server_args.hicache_io_backend = "direct"
            server_args.hicache_mem_layout = "layer_first"

    @override
    def support_mamba_cache_extra_buffer(self) -> bool:
        return True

    @override
    def get_default_attention_backend(self) -> str:
        return "torch_native"

    @override
    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == "NGRAM"

    @override
    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        """None: SGLang's own worker, whose kernels are replaced here, before it is imported."""
        from sglang_elora.platforms.speculative import use_torch_trees

        use_torch_trees()
        return None

    @override
    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from sglang_elora.platforms.speculative import slots_of_drafts

        return slots_of_drafts
