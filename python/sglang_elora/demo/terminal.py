"""The demo's output while it runs: live on a terminal, otherwise plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from sglang_elora.demo.report import milliseconds
from sglang_elora.demo.summary import share
from sglang_elora.demo.turns import TurnFailure, TurnRecord, TurnResult
from sglang_elora.demo.watch import CacheWatch

_PLAIN_WIDTH = 110  # columns without a terminal; rich's default of 80 wraps the tables
_PLAIN_LINES = 8  # progress lines per run without a terminal


class Step:
    """One line of the demo; ``detail`` may be set until the step ends."""

    def __init__(self) -> None:
        self.detail = ""


class Terminal:
    """Prints steps, progress and rich renderables."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(highlight=False)
        self.live = console.is_terminal
        if not self.live:
            console.width = max(console.width, _PLAIN_WIDTH)
        self.console = console

    def banner(self, title: str, text: str) -> None:
        """Print a framed introduction."""
        self.console.print(
            Panel(text, title=f"[bold]{title}", title_align="left", padding=(1, 2), expand=False)
        )

    def say(self, renderable: object = "", *, style: str | None = None) -> None:
        """Print anything rich can render; strings may hold rich markup."""
        self.console.print(renderable, style=style)

    def say_verbatim(self, line: str, *, style: str | None = None) -> None:
        """Print text for copying, without markup, wrapping or highlighting."""
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a spinner while the body runs, then a check mark (or a cross) and the duration."""
        with self._timed(title) as step:
            if self.live:
                with self.console.status(f"{title} …"):
                    yield step
            else:
                yield step

    @contextmanager
    def chats(self, num_turns: int, watch: CacheWatch) -> Iterator[Callable[[TurnResult], None]]:
        """A step that yields a callback for results; shows progress, totals and the cache.

        On a terminal the cache is shown as by ``sglang-elora top``, until the chats end.
        """
        meter = _Meter(num_turns)
        with self._timed("chats") as step:
            if self.live:
                bar = self._bar()

                def view() -> RenderableType:
                    return Group(bar, Text(), watch.screen(self.console, lines_taken=4))

                with (
                    Live(
                        get_renderable=view,
                        console=self.console,
                        refresh_per_second=4,
                        transient=True,
                    ),
                    watch.running(),
                ):
                    yield partial(_advance, bar, bar.add_task("", total=num_turns), meter)
            else:
                with watch.running():
                    yield partial(self._print_progress, meter, watch)
            step.detail = f"{meter.num_answers} of {num_turns} turns · {meter.numbers()} "

    @contextmanager
    def _timed(self, title: str) -> Iterator[Step]:
        step, started = Step(), time.perf_counter()
        mark = "[red]✗[/]"
        try:
            yield step
            mark = "[green]✓[/]"
        finally:
            took = f"{time.perf_counter() - started:.1f} s"
            self.console.print(f"{mark} [bold]{title:<11}[/] {step.detail}  [dim]{took}[/]")

    def _bar(self) -> Progress:
        return Progress(
            TextColumn(" "),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("turns"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )

    def _print_progress(self, meter: _Meter, watch: CacheWatch, result: TurnResult) -> None:
        meter.add(result)
        interval = max(1, meter.num_turns // _PLAIN_LINES)
        if meter.num_results % interval == 0:
            count = f"{meter.num_results:>4}/{meter.num_turns} turns"
            numbers = " · ".join(filter(None, (meter.numbers(), watch.numbers())))
            self.console.print(f"  {count}  {meter.elapsed_s:5.1f} s  {numbers}", soft_wrap=True)


def _advance(bar: Progress, task: TaskID, meter: _Meter, result: TurnResult) -> None:
    meter.add(result)
    bar.update(task, advance=1, description=meter.numbers())


@dataclass(slots=True)
class _Meter:
    """Running totals of the results so far; changed only by ``add``."""

    num_turns: int
    num_results: int = 0
    num_failures: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft_sum_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    @property
    def num_answers(self) -> int:
        return self.num_results - self.num_failures

    def add(self, result: TurnResult) -> None:
        self.num_results += 1
        if isinstance(result, TurnFailure):
            self.num_failures += 1
        elif isinstance(result, TurnRecord):
            self.prompt_tokens += result.prompt_tokens
            self.cached_tokens += result.cached_tokens
            self.completion_tokens += result.completion_tokens
            self.ttft_sum_s += result.ttft_s

    def numbers(self) -> str:
        mean_ttft = milliseconds(self.ttft_sum_s / self.num_answers) if self.num_answers else "—"
        parts = [
            f"{self.completion_tokens / self.elapsed_s:,.0f} tokens/s",
            f"mean TTFT {mean_ttft}",
            f"cached {share(self.cached_tokens, self.prompt_tokens):.0%}",
        ]
        if self.num_failures:
            parts.append(f"[red]{self.num_failures} failed[/]")
        return " · ".join(parts)
