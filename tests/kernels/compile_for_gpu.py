"""Compile the kernels for a GPU that need not be here: ``compile_for_gpu.py SM`` prints JSON lines.

Each line is one launch configuration with what the assembler says of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang_elora.kernels import launch_configs
from sglang_elora.kernels.batch_tables import END, FIRST, OFFSETS, RANK, SCALING, record_ints
from sglang_elora.kernels.lora_expand import _lora_expand
from sglang_elora.kernels.lora_lookup import _BLOCK_N, _WEIGHTS, _lora_lookup
from sglang_elora.kernels.lora_shrink import _lora_shrink
from sglang_elora.kernels.page_copy import _BLOCK_WORDS, JOB_INTS, _page_copy
from sglang_elora.kernels.routed_tiles import _BLOCK, _routed_tiles

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    **dict.fromkeys(("x", "plane", "output"), "weights"),
    "inner": "*fp32",
    **dict.fromkeys(("tiles", "rows", "owner_tiles", "owners", "firsts", "ends"), "*i32"),
    **dict.fromkeys(("addresses", "jobs", "planes", "tokens"), "*i64"),
}
WEIGHTS = {"bf16": "default.json", "fp16": "default.json", "fp32": "float32.json"}
LORA = {
    "SLOT_ELEMS": 1024,
    "RECORD": record_ints(4),
    "FIRST": FIRST,
    "END": END,
    "RANK": RANK,
    "OFFSETS": OFFSETS,
    "EMULATED": False,
}
ALIGNED = {*POINTERS, "x_stride", "output_stride", "inner_stride"} - {"jobs", "tokens"}


def compiled(
    kernel: Any, constants: dict[str, Any], weights: str, sm: int, warps: int, stages: int
) -> dict[str, Any]:
    names = kernel.arg_names
    types = {name: kind if kind != "weights" else f"*{weights}" for name, kind in POINTERS.items()}
    if kernel is _routed_tiles:
        types["topk_ids"] = f"*{weights}"
    if constants.get("PLANES") and "plane" in names:  # it has addresses
        types["plane"] = "*i64"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in ALIGNED and name not in constants
        },
    )
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    ptx = binary.asm["ptx"]
    return {
        "registers": int(usage[0]),
        "stack_bytes": int(usage[1]),
        "local_bytes": int(usage[2]),
        "shared_bytes": binary.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\.v4\.b32|cp\.async\.cg[^;]*0x10", ptx)),
        "wide_stores": len(re.findall(r"st\.global\.v4\.b32", ptx)),
        "tensor_core": len(re.findall(r"mma\.sync|wgmma\.mma", ptx)),
    }


def shrink_constants(entry: dict[str, Any], rows_per_input: int = 1) -> dict[str, Any]:
    launch = entry["launch"]
    return LORA | {
        "SCALING": SCALING,
        "PARTS": 3,
        "IN_FEATURES": 4096,
        "ROWS_PER_INPUT": rows_per_input,
        "A_STRIDE": 4096,
        "CHUNK": launch["block_k"],
        "BLOCK_M": entry["shape"]["tile_rows"],
        "BLOCK_N": launch["block_n"],
        "BLOCK_K": launch["block_k"],
    }


def expand_constants(entry: dict[str, Any]) -> dict[str, Any]:
    launch = entry["launch"]
    return LORA | {
        "OUT_FEATURES": (4096, 1024, 1024),
        "B_STRIDES": (4096, 1024, 1024),
        "PLANES": 0,
        "ALIGNMENT": 16,
        "CHUNK": launch["block_n"],
        "BLOCK_M": entry["shape"]["tile_rows"],
        "BLOCK_N": launch["block_n"],
        "BLOCK_R": launch["block_r"],
        "EVEN_N": True,
    }


def logits_constants(entry: dict[str, Any]) -> dict[str, Any]:
    one_part = {"OUT_FEATURES": (4096,), "B_STRIDES": (4096,)}
    return expand_constants(entry) | one_part | {"PLANES": 2, "ALIGNMENT": 16}


def of_launch(
    kernel: Any, constants: dict[str, Any], weights: str, sm: int, entry: dict[str, Any]
) -> dict[str, Any]:
    warps, stages = entry["launch"]["num_warps"], entry["launch"]["num_stages"]
    return {"weights": weights, **entry, **compiled(kernel, constants, weights, sm, warps, stages)}


def launches(sm: int) -> Iterator[dict[str, Any]]:
    folder = Path(launch_configs.__file__).parent
    for weights, file in WEIGHTS.items():
        entries = json.loads((folder / file).read_text())
        for entry in entries["shrink"]:
            constants = shrink_constants(entry)
            yield {"kernel": "shrink", **of_launch(_lora_shrink, constants, weights, sm, entry)}
            constants = shrink_constants(entry, rows_per_input=8)
            yield {"kernel": "routes", **of_launch(_lora_shrink, constants, weights, sm, entry)}
        for entry in entries["expand"]:
            constants = expand_constants(entry)
            yield {"kernel": "expand", **of_launch(_lora_expand, constants, weights, sm, entry)}
            constants = logits_constants(entry)
            yield {"kernel": "logits", **of_launch(_lora_expand, constants, weights, sm, entry)}
    for (weights, dtype), tile_rows in product(
        zip(WEIGHTS, _WEIGHTS.values(), strict=True), (16, 64)
    ):
        constants = {
            **{name: value for name, value in LORA.items() if name != "EMULATED"},
            "MODULE": 0,
            "SCALING": SCALING,
            "WEIGHTS": dtype,
            "PART_SIZE": 4032,
            "A_STRIDE": 4032,
            "PLANES": 2,
            "BLOCK_M": tile_rows,
            "BLOCK_N": _BLOCK_N,
        }
        yield {
            "kernel": "lookup",
            "weights": weights,
            **compiled(_lora_lookup, constants, weights, sm, 4, 1),
        }
    for ids, grouped in product(("i32", "i64"), (True, False)):
        constants = {
            **{name: LORA[name] for name in ("RECORD", "FIRST", "END", "RANK")},
            **({} if grouped else {"firsts": None, "ends": None}),
            "NUM_EXPERTS": 128,
            "COLUMNS": tuple(OFFSETS + i for i in range(4)),
            "BLOCK_ELEMS": (2 * 4096, 2 * 768, 768, 4096),
            "BLOCK": _BLOCK,
            "BLOCK_RECORD": triton.next_power_of_2(LORA["RECORD"]),
        }
        yield {"kernel": "routed_tiles", **compiled(_routed_tiles, constants, ids, sm, 4, 1)}
    for to_pool in (True, False):
        constants = {
            "WORD": triton.language.int32,
            "WORD_BYTES": 4,
            "ALIGNMENT": 16,
            "JOB": JOB_INTS + 4,
            "HEAD": JOB_INTS,
            "PLANES": 2,
            "SLOT_WORDS": 512,
            "CHUNK": 512,
            "BLOCK": _BLOCK_WORDS,
            "TO_POOL": to_pool,
        }
        yield {"kernel": "page_copy", **compiled(_page_copy, constants, "", sm, 4, 1)}


if __name__ == "__main__":
    for line in launches(int(sys.argv[1])):
        print(json.dumps(line))
