"""LoRA on the experts of mixture-of-experts layers, with weights in KV pages.

The seam is SGLang's: runners of experts call two hooks, between the first product and the
activation, and between the second product and the sum over a token's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.lora.layers import FusedMoEWithLoRA
from sglang.srt.lora.lora_moe_runners import LoRAHooks
from typing_extensions import override

from sglang_elora.pages import WeightRef
from sglang_elora.srt.lora.lora_backend import PagedLoRABackend

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE


class ExpertsWithLoRA(FusedMoEWithLoRA):
    """SGLang's layer of experts with LoRA.

    It takes the place of the base layer's computation, and leaves to it what is around: sending
    tokens to experts, and the sum over tensor-parallel ranks. ``why_not_served`` says for which
    layers it is not.
    """

    lora_backend: PagedLoRABackend
    gate_up_lora_a_weights: WeightRef
    down_lora_a_weights: WeightRef

    def __init__(
        self, base_layer: FusedMoE, lora_backend: PagedLoRABackend, **options: Any
    ) -> None:
        super().__init__(base_layer, lora_backend, **options)
        lora_backend.experts_per_row = base_layer.top_k or 1
        self._run_without_lora: Callable[..., Any] = base_layer.run_moe_core
        base_layer.run_moe_core = self._run_moe_core_with_lora

    @override
    def forward(self, hidden_states: torch.Tensor, topk_output: Any, **options: Any) -> Any:
        return self.base_layer.forward(hidden_states, topk_output, **options)

    @override
    def _run_moe_core_with_lora(self, dispatch_output: Any) -> Any:
        backend = self.lora_backend
        own = (self.gate_up_lora_a_weights.module, self.down_lora_a_weights.module)
        if backend.batch_info is None or not any(map(backend.adapts, own)):
            return self._run_without_lora(dispatch_output=dispatch_output)
        return self._lora_runner.run(dispatch_output, self._quant_info, lora_info=self)

    def hooks(self, topk_ids: torch.Tensor) -> LoRAHooks:
        """Hooks that add the products of each row's adapter and experts.

        Args:
            topk_ids: Integers ``[rows, experts per row]``; negative: none.
        """
        backend = self.lora_backend
        routes = backend.routes(topk_ids)

        def after_gate_up(
            x: torch.Tensor, output: torch.Tensor, factors: torch.Tensor, _: torch.Tensor
        ) -> None:
            backend.add_to_routes(x, self.gate_up_lora_a_weights, output.flatten(0, 1), routes)

        def after_down(
            x: torch.Tensor, output: torch.Tensor, factors: torch.Tensor, _: torch.Tensor
        ) -> None:
            backend.add_to_routes(
                x, self.down_lora_a_weights, output.flatten(0, 1), routes, factors.flatten()
            )

        return LoRAHooks(after_gate_up, after_down)


def hooks_of(_: torch.Tensor, lora_info: ExpertsWithLoRA, topk_ids: torch.Tensor) -> LoRAHooks:
    """The hooks for one call of a runner. In place of SGLang's ``build_lora_hooks``."""
    return lora_info.hooks(topk_ids)


def why_not_served(layer: FusedMoE) -> str | None:
    """Why LoRA on the experts of this layer is not served; None if it is."""
    config, runner = layer.moe_runner_config, layer.runner
    if runner is None or not runner.runner_backend.is_triton():
        return "their runner is not Triton's (--moe-runner-backend triton)"
    if not config.is_gated or config.gemm1_alpha is not None:
        return "SGLang's LoRA splits gate and up otherwise"
    if config.activation not in ("silu", "gelu"):
        return f"their activation is {config.activation}"
    if config.apply_router_weight_on_input:
        return "their input is scaled by the router"
    if layer.num_fused_shared_experts > 0:
        return "shared experts are fused with them (--disable-shared-experts-fusion)"
    if layer.moe_ep_size > 1:
        return "they are spread over ranks (expert parallelism)"
    return None
