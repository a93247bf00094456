"""SGLang loads plugins in each of its processes; those without adapters get nothing installed."""

from __future__ import annotations

import json

import pytest

from tests.harness.programs import source
from tests.harness.run_python import RunPython


@pytest.mark.parametrize(
    ("module", "process", "num_arguments", "imports_scheduler", "installs"),
    [
        ("detokenizer_manager", "run_detokenizer_process", 2, False, False),
        # SGLang's own module of it imports the scheduler's.
        ("data_parallel_controller", "run_data_parallel_controller_process", 3, True, False),
        ("scheduler", "run_scheduler_process", 7, True, True),
    ],
)
def test_only_the_scheduler_of_the_engines_processes_has_hooks(
    module: str,
    process: str,
    num_arguments: int,
    imports_scheduler: bool,
    installs: bool,
    run_fresh_python: RunPython,
) -> None:
    arguments = (f"sglang.srt.managers.{module}", process, str(num_arguments))
    result = run_fresh_python(
        "-W", "ignore", "-c", source("start_process"), *arguments, SGLANG_ELORA="1"
    )
    assert result.returncode == 0, result.stderr
    before, after, installed, num_hooks = json.loads(result.stdout.splitlines()[-1])
    assert before == imports_scheduler, "SGLang's own imports"
    assert after == imports_scheduler
    assert (installed, num_hooks > 0) == (installs, installs)
