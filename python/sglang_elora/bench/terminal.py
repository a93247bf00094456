"""Progress of a benchmark: a bar on a terminal, otherwise plain lines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sglang_elora.bench.matrix import Watcher
from sglang_elora.bench.record import Record


class Terminal:
    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    @contextmanager
    def progress(self, num_parts: int) -> Iterator[Watcher]:
        """Context with a watcher that shows the current step, number of answers and mean TTFT."""
        bar = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        with bar:
            task = bar.add_task("", total=num_parts)
            started_s = time.monotonic()
            what, ttft_ms = "", list[float]()

            def starts(text: str) -> None:
                nonlocal what
                what = text
                ttft_ms.clear()
                bar.update(task, description=text)
                if bar.disable:
                    self._console.print(f"{time.monotonic() - started_s:6.0f} s  {text}")

            def answered(record: Record) -> None:
                if record.ttft_s is not None:
                    ttft_ms.append(1e3 * record.ttft_s)
                    mean = statistics.fmean(ttft_ms)
                    numbers = f"{len(ttft_ms)} answers, mean TTFT {mean:.0f} ms"
                    bar.update(task, description=f"{what}: {numbers}")

            def left_out(text: str) -> None:
                bar.update(task, total=max(1, (bar.tasks[0].total or 1) - 1))
                self._console.print(f"left out: {text}", markup=False)

            yield Watcher(starts, answered, lambda: bar.advance(task), left_out)
