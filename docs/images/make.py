"""Makes the pictures of docs/control.md again: the page and ``top``, of a server under load.

    python docs/images/make.py

Sixteen adapters of the demo and a pool that does not hold them all beside their KV, with 32 chats
for a minute and a half. It needs chromium on the path and the extra [browser].
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from io import StringIO
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from sglang_elora.control.screen import moves, screen
from sglang_elora.demo.__main__ import MODEL, launch_flags
from sglang_elora.demo.chat import ChatPlan, hold_chats
from sglang_elora.testbed.adapters import demo_adapters, make_adapters
from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars
from sglang_elora.testbed.server import ServerProcess

HERE = Path(__file__).parent
WATCHED_S = 90
WIDTH, HEIGHT = 116, 34  # of the terminal
SERVER_FLAGS = (
    *("--max-total-tokens", "12000", "--enable-hierarchical-cache", "--hicache-ratio", "2"),
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
    *("--hicache-write-policy", "write_back"),
)


def watch_top(url: str, seconds: float) -> str:
    """What ``sglang-elora top`` shows after so long, as SVG without a font from elsewhere."""
    console = Console(record=True, width=WIDTH, height=HEIGHT, file=StringIO())
    before, swaps, end_s = None, deque[str](maxlen=8), time.monotonic() + seconds
    while True:
        state = httpx.get(f"{url}/elora/state", trust_env=False).json()
        swaps.extend(f"{time.strftime('%X')} {move}" for move in moves(before, state))
        if time.monotonic() > end_s:
            console.print(screen(state, before, swaps, width=WIDTH, height=HEIGHT))
            svg_format = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
            return console.export_svg(title="sglang-elora top", code_format=svg_format)
        before = state
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder [%(default)s]")
    options = parser.parse_args()
    silence_progress_bars()
    with tempfile.TemporaryDirectory(prefix="images-") as folder, sync_playwright() as playwright:
        checkpoint = make_checkpoint(Path(folder) / "base")
        adapters = make_adapters(checkpoint, Path(folder) / "adapters", demo_adapters())
        plan = ChatPlan(MODEL, list(adapters), num_turns=20, mean_think_s=7.0)
        with ServerProcess(
            launch_flags(checkpoint, adapters, SERVER_FLAGS),
            log_path=Path(folder) / "server.log",
        ) as server:
            chats = threading.Thread(target=lambda: asyncio.run(hold_chats(server.url, plan)))
            chats.start()
            chromium = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = chromium.new_page(viewport={"width": 1100, "height": 800})
            page.goto(f"{server.url}/elora/ui")
            (options.out / "top.svg").write_text(watch_top(server.url, WATCHED_S))
            page.screenshot(path=options.out / "ui.png", full_page=True)
            chromium.close()
        chats.join()  # they end with their server


if __name__ == "__main__":
    main()
