"""The ``sglang-elora`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sglang-elora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="report versions, platform, hooks, and what to do")
    commands.add_parser("demo", help="serve 16 adapters and chat with them", add_help=False)
    commands.add_parser("bench", help="measure stock and ELORA, or any server", add_help=False)
    commands.add_parser("top", help="watch a server's pool and adapters", add_help=False)
    commands.add_parser("drain", help="refuse new sessions, wait for the rest", add_help=False)
    commands.add_parser("fleet", help="place adapters on several servers", add_help=False)
    commands.add_parser("check-sglang", help="what another SGLang would break", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        from sglang_elora.demo.__main__ import main as demo

        return demo(rest)
    if arguments.command == "bench":
        from sglang_elora.bench.__main__ import main as bench

        return bench(rest)
    if arguments.command == "check-sglang":
        from sglang_elora.upstream.__main__ import main as check_sglang

        return check_sglang(rest)
    if arguments.command == "top":
        from sglang_elora.commands.top import main as top

        return top(rest)
    if arguments.command == "fleet":
        from sglang_elora.commands.fleet import main as fleet

        return fleet(rest)
    if arguments.command == "drain":
        from sglang_elora.commands.drain import main as drain

        return drain(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from sglang_elora.commands.doctor import main as doctor

    return doctor()


if __name__ == "__main__":
    sys.exit(main())
