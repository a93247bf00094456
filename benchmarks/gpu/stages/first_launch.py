"""Stage 1: checks of imports and memory, and one launch of each kernel."""

from __future__ import annotations

import filecmp
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages.stage_run import ROOT, Context, Step, Verdict

GPU_ONLY = ("sgl_kernel", "flashinfer")
MODULES = ("torch", "triton", "transformers", "peft", "httpx", "sglang", "sglang_elora")
MEMORY_BYTES = 2**30


def imports(context: Context) -> Verdict:
    """What the other stages import, and whether the bundle was built from this tree."""
    from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

    ensure_torchvision_importable()
    verdict = Verdict()
    for name in MODULES if context.dry_run else (*MODULES, *GPU_ONLY):
        try:
            found: Any = import_module(name)
            verdict.facts[name] = getattr(found, "__version__", None) or version("sglang-elora")
            verdict.right[f"{name} imports"] = True
        except Exception as error:  # noqa: BLE001  the reason is the finding
            verdict.facts[name], verdict.right[f"{name} imports"] = repr(error), False
        print(name, verdict.facts[name], flush=True)
    stale = stale_files(Path(import_module("sglang_elora").__file__ or "").parent)
    verdict.facts["stale"], verdict.right["the bundle is of this tree"] = stale[:5], not stale
    return verdict


def stale_files(installed: Path) -> list[str]:
    """Python files of the package that differ from the tree's, or are not installed."""
    source = ROOT / "python/sglang_elora"
    files = [path.relative_to(source) for path in source.rglob("*.py")]
    return [
        str(path)
        for path in files
        if not (installed / path).is_file()
        or not filecmp.cmp(source / path, installed / path, shallow=False)
    ]


def memory(context: Context) -> Verdict:
    """Check that a pattern written to the device is read back through pinned memory."""
    import torch

    device = "cpu" if context.dry_run else "cuda"
    size = 2**20 if context.dry_run else MEMORY_BYTES
    facts = {} if context.dry_run else {"free, total": torch.cuda.mem_get_info()}
    pattern = torch.arange(size // 8, device=device)
    back = torch.empty(size // 8, dtype=torch.int64, pin_memory=not context.dry_run)
    back.copy_(pattern)
    return Verdict({"memory returns what was written": torch.equal(back, pattern.cpu())}, facts)


def launch(context: Context) -> Verdict:
    """Both LoRA kernels over a few rows, page_copy over one small adapter, there and back."""
    import torch

    from sglang_elora.pages import ModuleShape

    import_module("benchmarks.kernels.shapes")
    replay = import_module("benchmarks.kernels.replay")
    page_copy = import_module("benchmarks.kernels.bench_page_copy")
    device = torch.device("cpu" if context.dry_run else "cuda")
    shapes = (ModuleShape("qkv_proj", 128, (128, 64, 64)), ModuleShape("o_proj", 128, (96,)))
    rows = replay.check(device, shapes=shapes, num_rows=4)
    pool = page_copy.Pool(device, shapes=shapes, num_layers=2, ranks=(3,))
    right = {
        "the LoRA kernels launch and are right": all(row["wrong"] == 0 for row in rows),
        "page_copy launches and is right": page_copy.check(pool),
    }
    return Verdict(right, {"rows": rows})


STEPS = (
    Step("imports", 150, imports),
    Step("memory", 60, memory),
    Step("launch", 200, launch, interpreted=True),
)
