"""Bytes and operations of the LoRA kernels per batch, and the resulting lower bounds of their time.

    python -m benchmarks.kernels.floor [--out DIR]

Computes counts only: nothing runs on a device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.kernels.shapes import EXPERT_SLOT_ELEMS, MODULES, ROOT, SLOT_ELEMS, Case, cases
from sglang_elora.pages import ModuleShape

WEIGHT_BYTES = 2  # bfloat16
INNER_BYTES = 4  # float32
ENTRY_BYTES = 4  # of a page table
H200_BYTES_PER_S = 4.3e12  # measured copy bandwidth, bytes read and written (shared/DESIGN.md)
H200_FLOPS = 989e12  # bfloat16 dense, NVIDIA's data sheet


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes and operations of one kernel; each byte is counted once."""

    weight_bytes: int = 0
    row_bytes: int = 0  # inputs, outputs, and what lies between the halves
    table_bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.weight_bytes + other.weight_bytes,
            self.row_bytes + other.row_bytes,
            self.table_bytes + other.table_bytes,
            self.flops + other.flops,
        )

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.row_bytes + self.table_bytes

    def floor_s(self, bytes_per_s: float = H200_BYTES_PER_S, flops: float = H200_FLOPS) -> float:
        return max(self.num_bytes / bytes_per_s, self.flops / flops)


def shrink_work(case: Case, module: ModuleShape) -> Work:
    """A of every adapter and all input rows are read, ``parts * rank`` sums per row written."""
    parts = len(module.out_features)
    weights = sum(parts * rank * module.in_features for rank in case.ranks)
    columns = _rows_times_rank(case) * parts
    return Work(
        weight_bytes=weights * WEIGHT_BYTES,
        row_bytes=case.num_rows * module.in_features * WEIGHT_BYTES + columns * INNER_BYTES,
        table_bytes=weights // SLOT_ELEMS * ENTRY_BYTES,
        flops=2 * columns * module.in_features,
    )


def expand_work(case: Case, module: ModuleShape) -> Work:
    """B of every adapter and the sums are read, all output rows read and written."""
    out, parts = sum(module.out_features), len(module.out_features)
    weights = sum(rank * out for rank in case.ranks)
    return Work(
        weight_bytes=weights * WEIGHT_BYTES,
        row_bytes=2 * case.num_rows * out * WEIGHT_BYTES
        + _rows_times_rank(case) * parts * INNER_BYTES,
        table_bytes=weights // SLOT_ELEMS * ENTRY_BYTES,
        flops=2 * _rows_times_rank(case) * out,
    )


def expert_work(module: ModuleShape, num_inputs: int, groups: Sequence[tuple[int, int]]) -> Work:
    """Both kernels of a module with experts.

    Args:
        num_inputs: Input rows, each read once.
        groups: Per pair of an adapter and an expert that a route uses: the adapter's rank, and the
            number of routes.
    """
    out, parts = sum(module.out_features), len(module.out_features)
    weights = sum(rank for rank, _ in groups) * (parts * module.in_features + out)
    columns = sum(rank * num_routes for rank, num_routes in groups)
    num_routes = sum(num_routes for _, num_routes in groups)
    return Work(
        weight_bytes=weights * WEIGHT_BYTES,
        row_bytes=(num_inputs * module.in_features + 2 * num_routes * out) * WEIGHT_BYTES
        + 2 * columns * parts * INNER_BYTES,
        table_bytes=weights // EXPERT_SLOT_ELEMS * ENTRY_BYTES,
        flops=2 * columns * (parts * module.in_features + out),
    )


def _rows_times_rank(case: Case) -> int:
    return sum(rows * rank for rows, rank in zip(case.rows_per_adapter, case.ranks, strict=True))


def count(case: Case) -> dict[str, object]:
    """One row of the result: per kernel, all four modules of one layer together."""
    row: dict[str, object] = {"case": case.name, **asdict(case)}
    total = Work()
    for name, work_of in (("shrink", shrink_work), ("expand", expand_work)):
        work = sum((work_of(case, module) for module in MODULES), Work())
        row[name] = {**asdict(work), "bytes": work.num_bytes, "floor_us": work.floor_s() * 1e6}
        total += work
    row["bytes"], row["flops"] = total.num_bytes, total.flops
    row["floor_us"] = total.floor_s() * 1e6
    row["flops_per_byte"] = total.flops / total.num_bytes
    return row


def table(rows: list[dict[str, object]]) -> str:
    densest = max(row["flops"] / row["bytes"] for row in rows)  # type: ignore[operator]
    lines = [
        "# Floor of the LoRA kernels",
        "",
        "Counted by `benchmarks/kernels/floor.py`. **Nothing was timed: GPU times are missing**",
        "(`benchmarks/gpu/TODO.md`). One layer of Llama-3-8B (qkv, o, gate_up, down), bfloat16,",
        f"each byte moved once at {H200_BYTES_PER_S / 1e12} TB/s, the copy bandwidth measured on",
        f"an H200. No batch has more than {densest:.0f} operations per byte; its tensor cores do",
        f"{H200_FLOPS / H200_BYTES_PER_S:.0f} in the time of one byte, so bytes are the floor.",
        "Columns: MB of weights and of rows (inputs, outputs, sums in between), µs of",
        "`lora_shrink`, `lora_expand` and both.",
        "",
        "| batch | weights | rows | shrink | expand | both | flop/byte |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        shrink, expand = row["shrink"], row["expand"]
        assert isinstance(shrink, dict) and isinstance(expand, dict)
        megabytes = [(shrink[kind] + expand[kind]) / 1e6 for kind in ("weight_bytes", "row_bytes")]
        lines.append(
            f"| {row['phase']} {row['num_rows']} rows, {row['num_adapters']} adapters, rank "
            f"{row['rank_mix']} | {megabytes[0]:.1f} | {megabytes[1]:.1f} | "
            f"{shrink['floor_us']:.1f} | {expand['floor_us']:.1f} | {row['floor_us']:.1f} | "
            f"{row['flops_per_byte']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/kernels")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [count(case) for case in cases()]
    limits = {"bytes_per_s": H200_BYTES_PER_S, "flops": H200_FLOPS}
    text = json.dumps({"counted_not_timed": True, "limits": limits, "rows": rows}, indent=1)
    (options.out / "floor.json").write_text(text + "\n")
    (options.out / "floor.md").write_text(table(rows))


if __name__ == "__main__":
    main()
