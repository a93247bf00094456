"""Bytes and operations of the kernels, by hand."""

from __future__ import annotations

from benchmarks.kernels.floor import Work, count, expand_work, shrink_work
from benchmarks.kernels.shapes import MODULES, Case, cases
from sglang_elora.pages import ModuleShape

SMALL = ModuleShape("qkv", 2048, (1024, 1024))


def test_kernel_work_of_one_adapter_equals_a_hand_count() -> None:
    case = Case("decode", 3, 1, "16")
    shrink = shrink_work(case, SMALL)
    # A: 2 parts x 16 rows x 2048; x: 3 x 2048; sums: 3 x 32 float32; 64 slots.
    assert shrink == Work(131072, 12288 + 384, 256, 2 * 3 * 32 * 2048)
    expand = expand_work(case, SMALL)
    # B: 16 x 2048; output 3 x 2048 read and written; the sums; 32 slots.
    assert expand == Work(65536, 24576 + 384, 128, 2 * 3 * 16 * 2048)


def test_kernel_work_does_not_pad_mixed_ranks() -> None:
    case = Case("prefill", 10, 4, "mixed")  # ranks 8, 16, 32, 64; rows 3, 3, 2, 2
    module = ModuleShape("o", 1024, (1024,))
    shrink = shrink_work(case, module)
    assert shrink.weight_bytes == (8 + 16 + 32 + 64) * 1024 * 2
    columns = 3 * 8 + 3 * 16 + 2 * 32 + 2 * 64
    assert shrink.row_bytes == 10 * 1024 * 2 + columns * 4
    assert shrink.flops == 2 * columns * 1024


def test_kernel_floor_is_the_slower_of_bytes_and_flops() -> None:
    work = Work(weight_bytes=100, row_bytes=20, table_bytes=4, flops=1000)
    assert work.num_bytes == 124
    assert work.floor_s(bytes_per_s=62, flops=1e9) == 2
    assert work.floor_s(bytes_per_s=1e9, flops=100) == 10


def test_kernel_floor_cases_assign_all_rows_to_adapters() -> None:
    all_cases = list(cases())
    assert len({case.name for case in all_cases}) == len(all_cases)
    for case in all_cases:
        per_adapter = [0] * case.num_adapters
        for adapter, rows in case.segments:
            per_adapter[adapter] += rows
        assert per_adapter == case.rows_per_adapter and min(per_adapter) > 0
        assert sum(per_adapter) == case.num_rows


def test_kernel_work_of_a_llama_layer_equals_a_hand_count() -> None:
    """64 adapters of rank 16: 64 x 16 x (3 x 4096 + 6144 + ...) weights of two bytes."""
    row = count(Case("decode", 64, 64, "16"))
    elements = sum(len(m.out_features) * m.in_features + sum(m.out_features) for m in MODULES)
    assert elements == 12288 + 6144 + 4096 + 4096 + 8192 + 28672 + 14336 + 4096
    weights = row["shrink"]["weight_bytes"] + row["expand"]["weight_bytes"]  # type: ignore[index]
    assert weights == 64 * 16 * elements * 2
