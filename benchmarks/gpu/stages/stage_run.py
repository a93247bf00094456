"""Runner of one stage's steps, each a process with a time-out; results survive a cut-off call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
STAGE_LIMIT_S = 480
"""Seconds that the time-outs of a stage's steps may add up to; the machine's limit is 600."""

STOP_S = 20
"""Seconds between SIGTERM, on which a step stops its servers, and SIGKILL."""


@dataclass(slots=True)
class Verdict:
    """Result of a step: passed or failed checks by name, and measured values."""

    right: dict[str, bool] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Context:
    """Where a step runs. ``work`` is shared by the steps of a stage and is packed after each."""

    work: Path
    models: Path  # checkpoints and adapters, shared by the steps; not packed
    dry_run: bool
    options: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a stage that runs in a process of its own.

    Args:
        interpreted: In a dry run, Triton's kernels run under its interpreter.
    """

    name: str
    timeout_s: int
    run: Callable[[Context], Verdict]
    interpreted: bool = False


def machine_facts() -> dict[str, Any]:
    """Facts of the machine for a row, the GPU and its driver among them."""
    from sglang_elora.bench.machine import machine

    facts: dict[str, Any] = {**machine(), "gpu": "none"}
    try:
        facts["triton"] = version("triton")
    except PackageNotFoundError:
        facts["triton"] = "not installed"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        facts["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        facts["gpu"] = "none"
    return facts


class StageRun:
    """Runner of a stage's steps, which keeps ``<name>.jsonl`` and ``<name>.tar.gz`` current.

    A step that times out, or a call that is cut off, loses nothing that came before it.
    """

    def __init__(self, name: str, out: Path, work: Path, command: Sequence[str]) -> None:
        self._name, self._out, self._work, self._command = name, out, work, tuple(command)
        self._facts = machine_facts()
        self.right: dict[str, bool] = {}
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def play(self, step: Step, env: Mapping[str, str]) -> None:
        """Run one step to its end or its time-out; its row is written and packed in any case."""
        print(f"== {step.name} (at most {step.timeout_s} s)", flush=True)
        started = time.monotonic()
        status = self._process(step, env)
        verdict = self._work / f"{step.name}.verdict.json"
        found: dict[str, Any] = {"right": {}, "facts": {}}
        if verdict.exists():
            found = json.loads(verdict.read_text())
        found["right"][f"{step.name} ran to its end"] = status == "ended"
        self.right |= found["right"]
        row = {"stage": self._name, "step": step.name, "status": status, **found}
        row |= {"seconds": round(time.monotonic() - started, 1), "machine": self._facts}
        with (self._out / f"{self._name}.jsonl").open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        self.pack()
        print(f"== {step.name}: {status}, {row['seconds']} s, {found['facts']}", flush=True)

    def pack(self) -> None:
        """Replace the archive of ``work`` by a newer one, never by half of one."""
        part = self._out / f"{self._name}.part"
        with tarfile.open(part, "w:gz") as archive:
            archive.add(self._work, arcname=self._name)
        os.replace(part, self._out / f"{self._name}.tar.gz")

    def report(self) -> bool:
        """One line for each thing that was right or wrong; True if all were right."""
        for name, is_right in self.right.items():
            print(f"{'right' if is_right else 'WRONG'}: {name}", flush=True)
        return all(self.right.values())

    def _process(self, step: Step, env: Mapping[str, str]) -> str:
        """Run the step's process, with its output to a file and stdout; returns how it ended."""
        process = subprocess.Popen(
            [*self._command, "--step", step.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        )
        echo = threading.Thread(target=self._echo, args=(process, step.name), daemon=True)
        echo.start()
        try:
            status = process.wait(step.timeout_s)
            said = "ended" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            said = f"timed out after {step.timeout_s} s"
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        echo.join(5)
        return said

    def _echo(self, process: subprocess.Popen[bytes], name: str) -> None:
        assert process.stdout is not None
        with process.stdout, (self._work / f"{name}.log").open("wb") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                sys.stdout.buffer.write(line)
                sys.stdout.flush()


def write_verdict(context: Context, step: str, verdict: Verdict) -> None:
    """Write a step's verdict to the file that the stage's process reads."""
    content = {"right": verdict.right, "facts": verdict.facts}
    (context.work / f"{step}.verdict.json").write_text(json.dumps(content, default=str))
