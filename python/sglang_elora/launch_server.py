"""``python -m sglang_elora.launch_server``: SGLang's server with ELORA's flags.

Takes every flag of ``python -m sglang.launch_server``, and ours.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence

from sglang_elora.config import REMOVED, EloraConfig
from sglang_elora.plugin import left_out


def split_arguments(argv: Sequence[str]) -> tuple[EloraConfig, list[str]]:
    """Separate our flags from SGLang's.

    Prints our part of the help if help is asked for; SGLang's parser prints its own.

    Returns:
        The configuration (flags over environment) and SGLang's arguments.

    Raises:
        ValueError: A flag or an environment variable is invalid.
        SystemExit: A flag of ours does not parse (argparse's exit 2).
    """
    parser = argparse.ArgumentParser(
        prog="python -m sglang_elora.launch_server",
        usage="%(prog)s [SGLang flags] [ELORA flags]",
        allow_abbrev=False,
        add_help=False,
    )
    EloraConfig.add_arguments(parser, EloraConfig.from_env(os.environ))
    namespace, rest = parser.parse_known_args(argv)
    for flag in {text.partition("=")[0] for text in rest} & REMOVED.keys():
        raise ValueError(f"{flag} was removed: {REMOVED[flag]}")
    if "-h" in rest or "--help" in rest:
        parser.print_help()
        print("\nSGLang's flags:\n")
    return EloraConfig.from_args(namespace), rest


def main(argv: Sequence[str] | None = None) -> None:
    try:
        config, rest = split_arguments(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        raise SystemExit(f"sglang_elora: {error}") from error
    if config.selects_anything and (reason := left_out(os.environ)) is not None:
        raise SystemExit(f"sglang_elora: {reason}")
    config.to_env(os.environ)

    gc.disable()  # importing creates many objects but no garbage: collecting takes 1/5 of its time
    from sglang_elora.srt.install.server import serve

    gc.enable()
    serve(rest)


if __name__ == "__main__":
    main()
