"""Stage 6: the server with CUDA graphs for decode and prefill, SGLang's default on CUDA."""

from __future__ import annotations

from benchmarks.gpu.stages.served import STEP_S, compare, graphs_in, serve_and_ask, torch_step
from benchmarks.gpu.stages.stage_run import Context, Step, Verdict

FLAGS: tuple[str, ...] = ()


def graphs(context: Context) -> Verdict:
    verdict = serve_and_ask(context, "graphs", "elora_triton", FLAGS)
    found = graphs_in((context.work / "graphs.server.log").read_text(errors="replace"))
    verdict.facts |= found
    if not context.dry_run:  # a CPU has no graphs
        verdict.right["prefill graphs were captured and replayed"] = found["prefill_replayed"]
    return verdict


STEPS = (
    torch_step(),
    Step("graphs", STEP_S, graphs, interpreted=True),
    Step("compare", 30, lambda context: compare(context, "graphs", "elora_torch")),
)
