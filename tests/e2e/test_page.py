"""``/elora/ui`` in a browser, on a server under load: it shows what ``/elora/state`` says."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from sglang_elora.testbed.server import ServerProcess
from tests.harness.client import Client, run
from tests.harness.server_flags import server_flags

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra [browser]")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")

NAMES = ("qv-r4", "attention-r8", "attention-r24", "mlp-r24", "all-r4", "rslora-r8", "all-r64")
POOL_SLOTS = 2500  # too few for all seven and their KV; all-r64 takes 2048
SMALL = ("qv-r4", "attention-r8", "all-r4")  # these fit together
ADMIN_KEY = "let-me-in"
WAIT_MS = 20_000
CONTRAST = 4.5  # WCAG 2.1, AA

COLOURS = "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
LANES = """lanes => lanes.map(lane => [lane.querySelector("span").textContent,
    [...lane.querySelectorAll("i")].map(part => part.title.split(",")[0])])"""
"""Of the timeline: name and tiers, in their order."""


@pytest.fixture(scope="module")
def server(checkpoint: Path, adapters: dict[str, Path], logs: Path) -> Iterator[ServerProcess]:
    given = {name: adapters[name] for name in NAMES}
    flags = ["--elora", "--elora-check", *server_flags(checkpoint, given)]
    flags += ["--max-total-tokens", str(POOL_SLOTS)]
    with ServerProcess(flags, log_path=logs / "page.log") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page, which logs nothing to its console and contacts only its server."""
    page = browser.new_page(**options)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/elora/ui")
    try:
        yield page
        assert said == []
        assert {f"{url}/elora/ui", f"{url}/elora/state"} == set(asked)
    finally:
        page.close()


@contextmanager
def load(url: str, prompts: Sequence[list[int]]) -> Iterator[None]:
    """A client per adapter, and one of the base model, each without a pause."""
    over = threading.Event()

    async def chat(client: Client, name: str | None) -> None:
        turn = 0
        while not over.is_set():
            prompt = [*prompts[1], *prompts[turn % len(prompts)]]
            await client.generate(name, prompt, num_tokens=8 + turn % 5)
            turn += 1

    async def work(client: Client) -> None:
        await asyncio.gather(*(chat(client, name) for name in (*NAMES, None)))

    clients = threading.Thread(target=run, args=(url, work))
    clients.start()
    try:
        yield
    finally:
        over.set()
        clients.join()


def state(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/elora/state", trust_env=False).json()
    return found


def move(url: str, what: str, name: str, tiers: Sequence[str]) -> None:
    """Send an order, wait until it is done, and then until the page has refreshed."""
    httpx.post(f"{url}/elora/{what}", json={"lora_name": name}, trust_env=False).raise_for_status()
    deadline = time.monotonic() + 20
    while not any(r["lora_name"] == name and r["tier"] in tiers for r in state(url)["adapters"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.5)


def ask(url: str, name: str, prompt: Sequence[int]) -> None:
    body = {"input_ids": list(prompt), "lora_path": name, "sampling_params": {"max_new_tokens": 4}}
    httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False).raise_for_status()


def settled(page: Page, url: str) -> dict[str, Any]:
    """The state of a server at rest, once the page has it."""
    time.sleep(1)
    now = state(url)
    assert now["pool"]["num_running"] == now["pool"]["num_waiting"] == 0
    page.wait_for_timeout(2500)
    return now


def test_ui_page_shows_the_server_state_under_load_and_after(
    server: ServerProcess, browser: Browser, prompts: Sequence[list[int]]
) -> None:
    with opened(browser, server.url) as page:
        with load(server.url, prompts):
            page.locator(".lane.swaps").nth(2).wait_for(timeout=WAIT_MS)
            running = page.locator("dt:text-is('requests running') + dd")
            sync_api.expect(running).not_to_have_text("0", timeout=WAIT_MS)
        move(server.url, "evict", "all-r64", ["host", "disk"])
        for name in SMALL:
            ask(server.url, name, prompts[0])
        now = settled(page, server.url)
        rows, pool = {row["lora_name"]: row for row in now["adapters"]}, now["pool"]

        blocks = page.locator("#map div").evaluate_all("all => all.map(block => block.title)")
        on_device = {n: r for n, r in rows.items() if r["slots"] + r["kv_tokens_device"]}
        expected = {
            f"{n}: {r['slots']} of weights, {r['kv_tokens_device']} of KV slots"
            for n, r in on_device.items()
        }
        others = {"KV of the base model": pool["kv_base"], "free": pool["free"]}
        expected |= {f"{name}: {slots} slots" for name, slots in others.items() if slots}
        assert set(blocks) == expected and set(SMALL) <= set(on_device)
        areas = page.locator("#map div").evaluate_all(
            "all => all.map(block => block.offsetWidth * block.offsetHeight)"
        )
        sizes = [sum(map(int, re.findall(r"(\d+)(?: of| slots)", title))) for title in blocks]
        for area, size in zip(areas, sizes, strict=True):
            assert area / sum(areas) == pytest.approx(size / sum(sizes), abs=0.01)

        tree = page.locator("#tree tr").evaluate_all(
            "all => all.map(row => [...row.cells].map(cell => cell.textContent))"
        )
        cells = {cell[0].lstrip("├└ "): cell for cell in tree}
        assert cells["all"][3:6] == [str(pool[n]) for n in ("adapters", "kv", "kv_host")]
        assert cells["base model"][4] == str(pool["kv_base"])
        assert set(cells) == {"all", "base model", *NAMES}
        for name, row in rows.items():
            numbers = (row["slots"], row["kv_tokens_device"], row["kv_tokens_host"], row["visits"])
            assert cells[name][1] == row["tier"] and cells[name][3:7] == [str(n) for n in numbers]

        lanes = dict(page.locator(".lane.swaps").evaluate_all(LANES))
        assert len(lanes) >= 3
        assert all(tiers[-1] == rows[name]["tier"] for name, tiers in lanes.items())


def wait_until_shown(page: Page, name: str, tiers: list[str]) -> None:
    """The page asks for the state once a second, and later on a busy machine."""
    for _ in range(WAIT_MS // 100):
        rows = page.locator("#tree tr").evaluate_all(
            "all => all.map(row => [...row.cells].map(cell => cell.textContent))"
        )
        if any(name in row[0] and row[1] in tiers for row in rows):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{name} is not shown in {tiers}")


def test_ui_page_timeline_shows_swaps_in_order(server: ServerProcess, browser: Browser) -> None:
    move(server.url, "prefetch", "qv-r4", ["device"])
    with opened(browser, server.url) as page:
        wait_until_shown(page, "qv-r4", ["device"])
        move(server.url, "evict", "qv-r4", ["host", "disk"])
        wait_until_shown(page, "qv-r4", ["host", "disk"])
        move(server.url, "prefetch", "qv-r4", ["device"])
        wait_until_shown(page, "qv-r4", ["device"])
        tiers = dict(page.locator(".lane.swaps").evaluate_all(LANES))["qv-r4"]
        assert [tier for tier in tiers if tier not in ("loading", "reading")] in (
            ["device", "host", "device"],
            ["device", "disk", "device"],
        )


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_ui_page_fits_the_window_and_is_legible(
    server: ServerProcess, browser: Browser, color_scheme: str, width: int
) -> None:
    viewport = {"width": width, "height": 800}
    with opened(browser, server.url, viewport=viewport, color_scheme=color_scheme) as page:
        page.locator("#tree tr").nth(len(NAMES)).wait_for(timeout=WAIT_MS)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for part in ("h1", "h2 small", "dt", "td", "#uses li"):
            colours = page.locator(part).first.evaluate(COLOURS)
            assert contrast(*colours) >= CONTRAST, part
        ground = luminance(page.locator("h1").evaluate(COLOURS)[1])
        assert (ground < 0.2) == (color_scheme == "dark")


def test_ui_page_asks_for_the_admin_key(
    checkpoint: Path, adapters: dict[str, Path], browser: Browser, logs: Path
) -> None:
    given = {"qv-r4": adapters["qv-r4"]}
    flags = ["--elora", *server_flags(checkpoint, given), "--admin-api-key", ADMIN_KEY]
    with ServerProcess(flags, log_path=logs / "page-admin.log") as server:
        page = browser.new_page()
        page.goto(f"{server.url}/elora/ui")
        field, problem = page.get_by_label("admin key"), page.locator("#problem")
        for key in ("wrong", ADMIN_KEY):
            field.wait_for(timeout=WAIT_MS)
            assert not page.locator("main").is_visible()
            field.fill(key)
            field.press("Enter")
            if key != ADMIN_KEY:
                sync_api.expect(problem).to_contain_text("not the server's admin key")
        page.locator("#tree tr").nth(2).wait_for(timeout=WAIT_MS)
        assert "qv-r4" in (page.locator("#tree").text_content() or "")
        assert not field.is_visible() and problem.text_content() == ""
        page.close()


def luminance(colour: str) -> float:
    """Relative, of ``rgb(r, g, b)`` (WCAG 2.1)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(share * p for share, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
