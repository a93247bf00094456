"""Stage 8: PyTorch's CUDA sanitizer on a server whose pool is too small for its adapters and KV.

The sanitizer checks PyTorch's own operators, not the memory accesses of Triton kernels.
"""

from __future__ import annotations

import sys

from benchmarks.gpu.stages.served import EAGER, SHAPE, device_flags, server_flags, start_s
from benchmarks.gpu.stages.stage_run import Context, Step, Verdict
from sglang_elora.testbed.adapters import make_adapters
from sglang_elora.testbed.checkpoint import make_checkpoint
from sglang_elora.testbed.server import ELORA_SERVER, ServerProcess
from tests.harness.pressure import PRESSURE_SPECS, make_trace, pool_tokens, run_trace


def races(log: str) -> int:
    """Data races that the sanitizer reports in a log."""
    return log.count("CSAN detected a possible data race")


def pressure(context: Context) -> Verdict:
    checkpoint = make_checkpoint(context.models / "base", shape=SHAPE)
    trace = make_trace(num_requests=10 if context.dry_run else 60)
    asked = {session.adapter for session in trace.sessions}
    specs = [spec for spec in PRESSURE_SPECS if spec.name in asked]
    adapters = make_adapters(checkpoint, context.models / "adapters", specs)
    flags = ["--elora", "--elora-check", *server_flags(checkpoint, adapters)]
    flags += ["--dtype", "bfloat16", *EAGER, *device_flags(context)]
    flags += ["--max-total-tokens", str(max(4000, pool_tokens(specs, trace, 0.5)))]
    log_path = context.work / "sanitizer.server.log"
    with ServerProcess(
        flags,
        log_path=log_path,
        program=ELORA_SERVER,
        env={} if context.dry_run else {"TORCH_CUDA_SANITIZER": "1"},  # it needs CUDA
        startup_timeout_s=start_s(context),
    ) as server:
        records = run_trace(server.url, trace)
        log = log_path.read_text(errors="replace")
    print(log[-3000:], file=sys.stderr)
    failed = [record.error for record in records if record.error]
    return Verdict(
        {
            "the sanitizer reports no race": races(log) == 0,
            "every request was answered": bool(records) and not failed,
        },
        {"races": races(log), "requests": len(records), "errors": failed[:3]},
    )


STEPS = (Step("sanitizer", 420, pressure),)
