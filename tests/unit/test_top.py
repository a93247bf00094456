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


def test_the_bar_is_as_long_as_the_pool_is_full() -> None:
    assert pool_bar(state()["pool"], 20).plain == "a" * 4 + "K" * 6 + "r" * 2 + "." * 8
    assert len(pool_bar(state()["pool"], 3)) == 3


def test_what_moved_is_told_with_where_from_and_where_to() -> None:
    before = state(row("law", "host"), row("art", "device"))
    after = state(row("law", "loading"), row("art", "device"), row("new", "disk"))
    assert list(moves(before, after)) == ["law: host -> loading"]
    assert list(moves(None, after)) == []


def test_a_screen_has_pool_tiers_rates_rows_and_swaps() -> None:
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
def test_it_keeps_to_the_terminal(width: int, height: int) -> None:
    many = [row(f"adapter-{i}", "host") for i in range(500)]
    lines = shown(state(*many), None, ["swap"] * 50, width, height)
    assert len(lines) <= height and max(map(len, lines)) <= width


def test_names_are_shown_as_they_are() -> None:
    assert any("[red]x[/]" in line for line in shown(state(row("[red]x[/]", "host"))))


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--once"]) == 1
    assert "http://127.0.0.1:9: " in capsys.readouterr().err
