"""Starts SGLang's server with the ELORA plugin loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sglang.launch_server import run_server
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils import kill_process_tree

from sglang_elora.config import active_config
from sglang_elora.srt.install.install import missing


def serve(argv: Sequence[str]) -> None:
    """Run the server until it ends; its child processes end with it.

    Args:
        argv: SGLang's command line, without ELORA's flags.

    Raises:
        SystemExit: The command line is invalid, SGLang differs from the pinned version, or it did
            not load the plugin.
    """
    load_plugins()
    problems = missing(active_config())
    if problems:
        raise SystemExit(
            "sglang_elora: SGLang did not load our plugin, so the flags would have no effect; "
            "'sglang-elora doctor' may say why.\n" + "\n".join(f"  - {p}" for p in problems)
        )
    server_args = prepare_server_args(list(argv))
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
