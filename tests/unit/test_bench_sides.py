"""Names of the benchmark's servers, and the flags they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_elora.bench.side_names import parse_side, suffix
from sglang_elora.bench.sides import Side, Sizes, make_side
from sglang_elora.bench.variant import write_stock_plugin

SIZES, NUM_ADAPTERS, LONGEST = Sizes(), 64, 2048


def made(name: str) -> Side:
    return make_side(name, SIZES, NUM_ADAPTERS, LONGEST)


def value(side: Side, flag: str) -> str | None:
    return side.flags[side.flags.index(flag) + 1] if flag in side.flags else None


def host_tokens(side: Side) -> int:
    ratio, tokens = value(side, "--hicache-ratio"), value(side, "--max-total-tokens")
    assert ratio is not None and tokens is not None
    return round(float(ratio) * int(tokens))


def test_side_name_is_split_into_system_options_and_threads() -> None:
    name = parse_side("stock-tuned:8+grouped+overlap+drain=0.5@2")
    assert (name.system, name.argument, name.threads) == ("stock-tuned", "8", 2)
    assert name.options == ("grouped", "overlap", "drain=0.5")
    assert name.setting_flags == ("--lora-drain-wait-threshold", "0.5")
    bounded = parse_side("elora:elora+most=8+sessions")
    assert bounded.setting_flags == ("--elora-max-adapters-per-batch", "8")
    assert bounded.others == ()
    assert parse_side("elora:elora_paper+without_recency").others == ("without_recency",)
    assert suffix("stock-tuned:8+grouped@1") == "+grouped@1"
    assert suffix("elora:elora@1") == "@1" and suffix("stock-default") == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stock", "must be stock-default"),
        ("stock-default:8", "must be stock-default"),
        ("stock-tuned", "must be stock-default"),
        ("stock-tuned:x", "must be stock-default"),
        ("elora", "must be stock-default"),
        ("elora:", "must be stock-default"),
        ("elora:lru@", "number of threads"),
        ("elora:lru@0", "number of threads"),
        ("stock-tuned:8+nothing", "nothing does not fit"),
        ("stock-tuned:8+hicache", "hicache does not fit"),
        ("stock-default+write_back", "write_back does not fit"),
        ("stock-default+lpm+lpm", "given twice"),
        ("stock-default+sessions", "sessions does not fit"),
        ("elora:elora+grouped", "grouped does not fit"),
        ("elora:elora+lfu", "lfu does not fit"),
        ("elora:elora+drain=1", "drain=1 does not fit"),
        ("stock-tuned:8+most=8", "most=8 does not fit"),
        ("stock-default+page=0", "page needs a positive number"),
        ("stock-default+drain=soon", "drain needs a positive number"),
    ],
)
def test_side_name_that_cannot_be_made_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        made(name)


def test_stock_default_has_a_host_tier_only_with_hicache() -> None:
    plain, with_host = made("stock-default"), made("stock-default+hicache")
    assert "--enable-hierarchical-cache" not in plain.flags
    assert with_host.flags[: len(plain.flags)] == plain.flags
    assert value(with_host, "--hicache-write-policy") == "write_through"
    back = made("stock-default+hicache+write_back")
    assert value(back, "--hicache-write-policy") == "write_back"


@pytest.mark.parametrize(
    "name", ["stock-default+hicache", "stock-tuned:6", "stock-tuned:10+grouped+overlap"]
)
def test_sides_with_a_host_tier_have_the_host_bytes_of_elora(name: str) -> None:
    assert abs(host_tokens(made(name)) - host_tokens(made("elora:elora"))) <= 1


def test_stock_variants_become_plugins_and_overlap_its_flags(tmp_path: Path) -> None:
    plain, both = made("stock-tuned:8"), made("stock-tuned:8+grouped+overlap")
    assert plain.stock_variants == () and both.stock_variants == ("grouped", "overlap")
    assert "--enable-lora-overlap-loading" not in plain.flags
    assert both.flags == (
        *plain.flags,
        *("--enable-lora-overlap-loading", "--max-loaded-loras", str(NUM_ADAPTERS)),
    )
    folder = write_stock_plugin(tmp_path, "overlap")
    (entry,) = folder.glob("*.dist-info/entry_points.txt")
    assert "variant_stock_overlap = sglang_elora.stock.variants:overlap" in entry.read_text()


def test_settings_become_flags_of_stock_and_of_elora() -> None:
    settings = made("stock-tuned:8+lpm+slru+write_through+chunk=512+mixed+page=16")
    assert value(settings, "--schedule-policy") == "lpm"
    assert value(settings, "--radix-eviction-policy") == "slru"
    assert value(settings, "--hicache-write-policy") == "write_through"
    assert value(settings, "--chunked-prefill-size") == "512"
    assert value(settings, "--page-size") == "16"
    assert "--enable-mixed-chunk" in settings.flags
    ours = made("elora:elora+lpm+sessions@2")
    assert value(ours, "--schedule-policy") == "lpm"
    assert (ours.names_sessions, ours.variants, ours.threads) == (True, (), 2)
