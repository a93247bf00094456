"""Plugins for a measured server: what each step of the scheduler took, in all and by part."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

FILE = "STEP_PROBE"
"""Environment variable that names the file to which a line per step is appended."""


def _timed(
    spent: dict[str, float], clock: Callable[[], float], name: str, call: Callable[..., Any]
) -> Callable[..., Any]:
    """``call``, adding the seconds that it takes by the clock to ``spent[name]``."""

    def measured(*args: Any, **options: Any) -> Any:
        begun = clock()
        try:
            return call(*args, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + clock() - begun

    return measured


def step_cpu() -> None:
    """Time the phases of a scheduler's step, in stock SGLang and in ELORA alike."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.__init__", _probe, HookType.AFTER
    )


def _probe(result: None, self: Any, *_: Any, **__: Any) -> None:
    """Wrap the instance's methods, so that the wrappers are outside all hooks of the class."""
    spent: dict[str, float] = {}
    timed = partial(_timed, spent, time.thread_time)
    for name in ("get_next_batch_to_run", "run_batch", "process_batch_result"):
        setattr(self, name, timed(name, getattr(self, name)))
    runner = self.tp_worker.model_runner
    runner.model.forward = timed("model", runner.model.forward)
    runner.sample = timed("sample", runner.sample)
    out = open(os.environ[FILE], "a", buffering=1)
    process = self.process_batch_result

    def step_is_over(batch: Any, *args: Any, **options: Any) -> Any:
        done = process(batch, *args, **options)
        spent["is_decode"] = float(batch.forward_mode.is_decode())
        spent["batch_size"] = float(batch.batch_size())
        out.write(json.dumps(spent) + "\n")
        spent.clear()
        return done

    self.process_batch_result = step_is_over


def step_wall() -> None:
    """Time each batch and its parts, in seconds of the monotonic clock."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.__init__", _probe_batches, HookType.AFTER
    )


def _probe_batches(result: None, self: Any, *_: Any, **__: Any) -> None:
    spent: dict[str, float] = {}
    out = open(os.environ[FILE], "a", buffering=1)
    runner, run_batch = self.tp_worker.model_runner, self.run_batch
    timed = partial(_timed, spent, time.perf_counter)

    def told(batch: Any, *args: Any, **options: Any) -> Any:
        line = {
            "is_decode": float(batch.forward_mode.is_decode()),
            "batch_size": float(batch.batch_size()),
            "num_adapters": float(len({req.lora_id for req in batch.reqs})),
        }
        spent.clear()
        done = timed("run_batch", run_batch)(batch, *args, **options)
        out.write(json.dumps({**line, **spent}) + "\n")
        return done

    runner.model.forward = timed("model", runner.model.forward)
    runner.sample = timed("sample", runner.sample)
    self.run_batch = told
