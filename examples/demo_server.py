"""The demo's server for the examples, or one that is up already (``--url``)."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sglang_elora.demo.__main__ import launch_flags
from sglang_elora.testbed.server import ServerProcess

FOLDER = Path(".demo")


def parser(description: str | None) -> argparse.ArgumentParser:
    """For an example's command line."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--url", help="a server that is up, for example that of `make serve`")
    made.add_argument("--adapters", nargs="+", help="its adapters [the demo's]")
    return made


@contextmanager
def demo_server(options: argparse.Namespace) -> Iterator[tuple[str, Sequence[str]]]:
    """Address of a server, and the names of the adapters it has.

    Without ``--url`` it is the server of ``make demo``, with its model of random weights: what it
    says is gibberish, and each adapter's is its own.
    """
    from sglang_elora.testbed.adapters import demo_adapters, make_adapters
    from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars

    specs = demo_adapters()
    names = options.adapters or [spec.name for spec in specs]
    if options.url:
        yield options.url, names
        return
    silence_progress_bars()
    print("starting the demo's server (some 40 s) ...", flush=True)
    checkpoint = make_checkpoint(FOLDER.resolve() / "checkpoint")
    paths = make_adapters(checkpoint, FOLDER.resolve() / "adapters", specs)
    flags = launch_flags(checkpoint, paths)
    with (
        tempfile.TemporaryDirectory(prefix="example-") as logs,
        ServerProcess(flags, log_path=Path(logs) / "server.log") as server,
    ):
        yield server.url, names
