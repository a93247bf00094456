"""Stage 4: the server without CUDA graphs; its tokens are compared with ``elora_torch``'s."""

from __future__ import annotations

from benchmarks.gpu.stages.served import EAGER, STEP_S, compare, serve_and_ask, torch_step
from benchmarks.gpu.stages.stage_run import Context, Step, Verdict


def triton(context: Context) -> Verdict:
    return serve_and_ask(context, "elora_triton", "elora_triton", EAGER)


STEPS = (
    torch_step(),
    Step("elora_triton", STEP_S, triton, interpreted=True),
    Step("compare", 30, lambda context: compare(context, "elora_triton", "elora_torch")),
)
