"""The adapters that the end-to-end tests serve: every shape of PEFT LoRA we promise."""

from __future__ import annotations

from sglang_elora.testbed.adapters import ALL_LINEAR, ATTENTION, MLP, QUERY_VALUE, AdapterSpec

SPECS = (
    AdapterSpec("qv-r4", rank=4, alpha=4, target_modules=QUERY_VALUE, seed=1),
    AdapterSpec("qv-r8-alpha32", rank=8, alpha=32, target_modules=QUERY_VALUE, seed=2),
    AdapterSpec("attention-r8", rank=8, alpha=8, target_modules=ATTENTION, seed=3),
    AdapterSpec("attention-r24", rank=24, alpha=12, target_modules=ATTENTION, seed=4),
    AdapterSpec("mlp-r24", rank=24, alpha=48, target_modules=MLP, seed=5),
    AdapterSpec("mlp-r64", rank=64, alpha=64, target_modules=MLP, seed=6),
    AdapterSpec("all-r4", rank=4, alpha=16, target_modules=ALL_LINEAR, seed=7),
    AdapterSpec("all-r64", rank=64, alpha=32, target_modules=ALL_LINEAR, seed=8),
    AdapterSpec("rslora-r8", rank=8, alpha=4, target_modules=ALL_LINEAR, use_rslora=True, seed=9),
    AdapterSpec(
        "rslora-r24", rank=24, alpha=6, target_modules=QUERY_VALUE, use_rslora=True, seed=10
    ),
    AdapterSpec("q-only", rank=8, alpha=8, target_modules=("q_proj",), seed=11),
    AdapterSpec("k-and-up", rank=8, alpha=8, target_modules=("k_proj", "up_proj"), seed=12),
)
NAMES = tuple(spec.name for spec in SPECS)
