"""What ``sglang-elora top`` shows of a state."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from sglang_elora.commands.top import main
from sglang_elora.control.screen import moves, pool_bar, screen

COUNTS = {
    "adapter_loads": 7,
    "adapter_evictions": 2,
    "adapter_churn": 1,
    "kv_slots_evicted": 90,
    "adapter_lookups.device": 3,
    "adapter_lookups.host": 1,
    "adapter_lookups.disk": 0,
    "prompt_tokens.device": 0,
    "prompt_tokens.host": 0,
    "prompt_tokens.computed": 0,
}
USES = {"free": 40, "adapters": 20, "kv_of_adapters": 20, "kv_of_base": 10, "running": 10}


def row(name: str, tier: str, **more: Any) -> dict[str, Any]:
    return {
        "lora_name": name,
        "lora_id": f"id-{name}",
        "tier": tier,
        "pinned": False,
        "slots": 20 if tier == "device" else 0,
        "kv_tokens_device": 5,
        "kv_tokens_host": 0,
        "visits": 3,
        "idle_s": 2.0,
        **more,
    }


def state(*rows: dict[str, Any], **counts: int) -> dict[str, Any]:
    pool = {
        "slots": 100,
        "free": 40,
        "adapters": 20,
        "kv": 30,
        "kv_base": 10,
        "uses": USES,
        "adapter_host_bytes": 5_000_000,
        "num_running": 2,
        "num_waiting": 1,
        "counts": {**COUNTS, **counts},
    }
    return {"adapters": list(rows), "pool": pool}


def shown(
    now: dict[str, Any],
    before: dict[str, Any] | None = None,
    swaps: Sequence[str] = (),
    width: int = 100,
    height: int = 24,
) -> list[str]:
    console = Console(file=StringIO(), width=width, height=height)
    with console.capture() as capture:
        console.print(screen(now, before, swaps, width=width, height=height))
    return capture.get().splitlines()


def test_top_pool_bar_length_shows_the_share_in_use() -> None:
    assert pool_bar(state()["pool"], 20).plain == "a" * 4 + "K" * 6 + "r" * 2 + "." * 8
    assert len(pool_bar(state()["pool"], 3)) == 3


def test_top_lists_moved_adapters_with_old_and_new_tier() -> None:
    before = state(row("law", "host"), row("art", "device"))
    after = state(row("law", "loading"), row("art", "device"), row("new", "disk"))
    assert list(moves(before, after)) == ["law: host -> loading"]
    assert list(moves(None, after)) == []


def test_top_screen_shows_pool_tiers_rates_rows_and_swaps() -> None:
    rows = [row("old", "disk", idle_s=None), row("law", "device", pinned=True), row("art", "host")]
    lines = shown(state(*rows, adapter_loads=9), state(*rows), ["12:00:00 law: host -> device"])
    assert lines[0].startswith("100 slots, 40 free; requests: 2 running, 1 waiting")
    assert "device 1  loading 0  host 1  reading 0  disk 1" in lines[3]
    assert lines[4] == "adapters found: device 75%, host 25%", "no prompt was looked up"
    assert "adapter loads 9 (+2)" in lines[5]
    names = [line.split()[0] for line in lines[7:10]]
    assert names == ["law", "art", "old"], "nearest first"
    assert "law (pinned)" in lines[7] and lines[-1].endswith("host -> device")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60)])
def test_top_screen_fits_the_terminal(width: int, height: int) -> None:
    many = [row(f"adapter-{i}", "host") for i in range(500)]
    lines = shown(state(*many), None, ["swap"] * 50, width, height)
    assert len(lines) <= height and max(map(len, lines)) <= width


def test_top_shows_adapter_names_without_markup() -> None:
    assert any("[red]x[/]" in line for line in shown(state(row("[red]x[/]", "host"))))


def test_top_names_an_unreachable_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--once"]) == 1
    assert "http://127.0.0.1:9: " in capsys.readouterr().err
