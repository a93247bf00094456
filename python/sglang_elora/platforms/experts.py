"""Mixture-of-experts layers of the CPU platform, with SGLang's hooks for LoRA.

SGLang computes experts on a CPU without hooks. What is computed here is the same, in the same
order; layers without LoRA keep SGLang's own.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.moe import MoeRunnerBackend, MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from torch.nn.functional import linear
from typing_extensions import override

_ACTIVATIONS = {"silu": SiluAndMul, "gelu": GeluAndMul}


class CpuExperts(DispatchMoeRunnerCore):
    """In place of the Triton runner: experts with gated activations and without biases. Layers of
    other kinds have no LoRA on experts (``srt.lora.experts.why_not_served``) and are not run by it.
    """

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        self._activation = _ACTIVATIONS.get(config.activation, SiluAndMul)()

    @property
    @override
    def runner_backend(self) -> MoeRunnerBackend:
        return MoeRunnerBackend.TRITON

    @override
    def run_from_dispatch(
        self,
        dispatch_output: Any,
        quant_info: Any,
        runner_config: MoeRunnerConfig,
        hooks: Any = None,
    ) -> StandardCombineInput:
        """The layer's output ``[tokens, hidden_size]``.

        Args:
            dispatch_output: With ``hidden_states`` ``[tokens, hidden_size]`` and, per token, the
                chosen experts and their weights.
            quant_info: With ``w13_weight`` ``[experts, 2 * intermediate_size, hidden_size]`` and
                ``w2_weight`` ``[experts, hidden_size, intermediate_size]``.
            hooks: SGLang's ``LoRAHooks``; None: no LoRA.
        """
        x = dispatch_output.hidden_states
        factors, experts, _ = dispatch_output.topk_output
        chosen = [(expert, (experts == expert).nonzero()) for expert in experts.unique().tolist()]
        w13, w2 = quant_info.w13_weight, quant_info.w2_weight
        gate_up = x.new_empty(*experts.shape, w13.shape[1])
        for expert, places in chosen:
            rows, columns = places.T
            gate_up[rows, columns] = linear(x[rows], w13[expert])
        if hooks is not None:
            hooks.after_gate_up(x, gate_up, factors, experts)
        inner = self._activation(gate_up)
        output = x.new_empty(*experts.shape, w2.shape[1])
        for expert, places in chosen:
            rows, columns = places.T
            product = linear(inner[rows, columns], w2[expert])
            output[rows, columns] = product * factors[rows, columns, None].to(product.dtype)
        if hooks is not None:
            hooks.after_down(inner.flatten(0, 1), output, factors, experts)
        return StandardCombineInput(output.sum(dim=1))


def use_cpu_experts() -> None:
    """Register ``CpuExperts`` in this process."""
    register_moe_runner_core(MoeRunnerBackend.TRITON.value, CpuExperts)
