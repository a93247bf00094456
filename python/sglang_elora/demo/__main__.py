"""``python -m sglang_elora.demo``: many adapters, many chats, one server, no downloads."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_elora.demo.examples import example_lines
from sglang_elora.demo.loads import adapter_moves
from sglang_elora.demo.terminal import Terminal
from sglang_elora.testbed.server import ServerProcess, ServerStartError
from sglang_elora.testbed.signals import signals_ignored, sigterm_acts_as_ctrl_c

if TYPE_CHECKING:
    from sglang_elora.testbed.adapters import AdapterSpec

MODEL = "demo"
_SHORT_TURNS = 2
_SMALL_POOL = (
    *("--max-total-tokens", "9000", "--max-running-requests", "32"),
    *("--enable-hierarchical-cache", "--hicache-ratio", "2"),
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
    *("--hicache-write-policy", "write_back"),
)
"""Server flags for the chats: a pool that cannot hold all adapters and KV, batches limited only by
memory, and a host tier for KV."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0 if every turn was answered and no process of the server is left, 1 otherwise, 130 after
        Ctrl-C or SIGTERM (0 with ``--serve``, which ends by Ctrl-C).
    """
    options, server_flags = parse_arguments(sys.argv[1:] if argv is None else argv)
    terminal = Terminal()
    try:
        with sigterm_acts_as_ctrl_c():
            return _run(terminal, options, server_flags)
    except KeyboardInterrupt:
        terminal.say("\ninterrupted", style="yellow")
        return 130
    except (ServerStartError, ValueError) as error:
        terminal.say_verbatim(f"\n{error}", style="red")
        return 1


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The demo's options, and the server flags after ``--``."""
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m sglang_elora.demo",
        description="Build a small random model and LoRA adapters, serve them, and chat with all.",
        epilog="What follows -- goes to the server, for example: -- --max-total-tokens 8000",
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(".demo"), help="where everything is kept [%(default)s]"
    )
    parser.add_argument("--sessions", type=int, default=32, help="concurrent chats [%(default)s]")
    parser.add_argument("--turns", type=int, default=4, help="turns of each chat [%(default)s]")
    parser.add_argument("--adapters", type=int, default=16, help="LoRA adapters [%(default)s]")
    parser.add_argument(
        "--short",
        action="store_true",
        help=f"one chat of {_SHORT_TURNS} turns per adapter, for continuous integration",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="hold no chats: keep the server up until Ctrl-C and print requests to try",
    )
    options = parser.parse_args(argv[:at])
    if options.short:
        options.sessions, options.turns = options.adapters, _SHORT_TURNS
    if options.adapters < 1 or options.sessions < options.adapters or options.turns < 1:
        parser.error(
            f"--sessions {options.sessions} --turns {options.turns} --adapters {options.adapters}: "
            "at least one turn and one adapter, and a session for each adapter"
        )
    return options, argv[at + 1 :]


def _run(terminal: Terminal, options: argparse.Namespace, server_flags: Sequence[str]) -> int:
    directory: Path = options.dir.resolve()
    terminal.banner("ELORA demo", _introduction(options))
    with terminal.step("libraries") as step:
        # Imported here because it takes seconds, during which the user should see a step.
        import openai  # noqa: F401  (for the chats; with the others to be shown as one step)

        from sglang_elora.testbed.adapters import demo_adapters, make_adapters
        from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars

        silence_progress_bars()
        step.detail = "torch, transformers"
    with terminal.step("checkpoint") as step:
        checkpoint = make_checkpoint(directory / "checkpoint")
        step.detail = "Llama, 4 layers of width 256, random weights"
    specs = demo_adapters(options.adapters)
    with terminal.step("adapters") as step:
        paths = make_adapters(checkpoint, directory / "adapters", specs)
        ranks = sorted(spec.rank for spec in specs)
        step.detail = f"{len(specs)} of rank {ranks[0]} to {ranks[-1]}"
    pool = () if options.serve else _SMALL_POOL
    server = ServerProcess(
        launch_flags(checkpoint, paths, [*pool, *server_flags]),
        log_path=directory / "server.log",
    )
    terminal.say_verbatim(f"\n$ {_shown(server.command)}\n", style="dim")
    try:
        with terminal.step("server") as step:
            server.start()
            step.detail = f"up at {server.url}"
        if options.serve:
            return _serve(terminal, server, paths)
        return _chat(terminal, server, specs, paths, options, directory)
    finally:
        with signals_ignored(), terminal.step("shutdown") as step:
            server.stop()
            step.detail = "everything shut down, no process left"


def _serve(terminal: Terminal, server: ServerProcess, adapters: Mapping[str, Path]) -> int:
    terminal.say()
    for line in example_lines(server.url, MODEL, adapters):
        terminal.say_verbatim(line, style="dim" if line.startswith("#") else None)
    terminal.say("\n[bold]Ctrl-C ends the server.[/]")
    try:
        status = server.wait()
    except KeyboardInterrupt:
        terminal.say()
        return 0
    terminal.say_verbatim(f"the server ended with status {status}:\n{server.log_tail()}")
    return 1


def _chat(
    terminal: Terminal,
    server: ServerProcess,
    specs: Sequence[AdapterSpec],
    adapters: Mapping[str, Path],
    options: argparse.Namespace,
    directory: Path,
) -> int:
    from sglang_elora.demo.chat import ChatPlan, hold_chats
    from sglang_elora.demo.plot import save_plot
    from sglang_elora.demo.report import adapter_table, cache_table, slot_table, turn_table
    from sglang_elora.demo.summary import DemoRun
    from sglang_elora.demo.watch import CacheWatch

    plan = ChatPlan(
        model=MODEL,
        adapters=list(adapters),
        num_sessions=options.sessions,
        num_turns=options.turns,
        mean_think_s=1.0 if options.short else 2.0,  # slow enough to follow on the screen
    )
    terminal.say_verbatim(f"\nopen {server.url}/elora/ui to see the pool while the chats run\n")
    started = time.perf_counter()
    watch = CacheWatch(server.url)
    with terminal.chats(plan.num_requests, watch) as show:
        results = asyncio.run(hold_chats(server.url, plan, show))
    run = DemoRun(
        specs=specs,
        results=results,
        moves=adapter_moves(server.log_path, adapters),
        counts=watch.counts(),
        pool_slots=watch.pool_slots,
        duration_s=time.perf_counter() - started,
        server_command=server.command,
    )
    records_path = directory / "chats.json"
    run.save(records_path)
    for failure in run.failures:
        terminal.say_verbatim(
            f"session {failure.session} ({failure.adapter}), turn {failure.turn + 1}: "
            f"{failure.error}",
            style="red",
        )
    if run.records:
        terminal.say()
        terminal.say(turn_table(run))
        terminal.say(adapter_table(run))
        plot_path = directory / "chats.png"
        save_plot(run, plot_path)
        terminal.say_verbatim(f"plot     {plot_path}")
        terminal.say()
        terminal.say(cache_table(run))
        terminal.say(slot_table(run))
    terminal.say_verbatim(f"records  {records_path}")
    terminal.say_verbatim(f"log      {server.log_path}\n")
    return 0 if len(run.records) == plan.num_requests else 1


def launch_flags(
    checkpoint: Path, adapters: Mapping[str, Path], extra: Sequence[str] = ()
) -> list[str]:
    """The server's flags without host and port; ``extra`` is last and overrides the others."""
    return [
        *("--model-path", str(checkpoint)),
        *("--served-model-name", MODEL),
        *("--dtype", "float32"),
        "--elora",
        "--enable-lora",
        *("--lora-paths", *(f"{name}={path}" for name, path in adapters.items())),
        *("--max-loras-per-batch", "8"),
        *("--max-running-requests", "16"),
        *("--max-total-tokens", "20000"),
        "--enable-cache-report",
        *extra,
    ]


def _introduction(options: argparse.Namespace) -> str:
    first = (
        f"Builds a small random [bold]Llama[/] and [bold]{options.adapters} LoRA adapters[/] of "
        "mixed rank in\n"
        f"{options.dir}/, and serves all of them from one SGLang server on this machine.\n"
    )
    if options.serve:
        return first + "Then prints requests to try, and serves until Ctrl-C."
    return first + (
        f"[bold]{options.sessions} chats[/] of {options.turns} turns run at once, each with one "
        "adapter for its life.\nThe pool is too small for all adapters and all KV "
        "at once: watch it load and evict."
    )


def _shown(command: Sequence[str]) -> str:
    """The command for display: "python" for this interpreter, paths relative to the current
    folder."""
    here = f"{Path.cwd()}/"
    words = shlex.join(["python", *(argument.replace(here, "") for argument in command[1:])])
    lines = textwrap.wrap(words, 96, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
