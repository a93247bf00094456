"""Files of adapters, read by SGLang's own loader into blocks of the host arena."""

from __future__ import annotations

import gc
import random
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_elora.pages import AdapterImage, HostArena, lazy_memory
from sglang_elora.platforms import host_memory
from sglang_elora.swapper.host_tier import HostTier
from sglang_elora.swapper.reading import Read
from sglang_elora.testbed.adapters import (
    ALL_LINEAR,
    ATTENTION,
    MLP,
    QUERY_VALUE,
    AdapterSpec,
    make_adapters,
)

WEIGHTS = "adapter_model.safetensors"
BLOCK = 4096
SPECS = (
    AdapterSpec("qv-r4", rank=4, alpha=4, target_modules=QUERY_VALUE, seed=1),
    AdapterSpec("all-r4", rank=4, alpha=16, target_modules=ALL_LINEAR, seed=2),
    AdapterSpec("rslora-r8", rank=8, alpha=4, target_modules=ALL_LINEAR, use_rslora=True, seed=3),
    AdapterSpec("k-and-up", rank=8, alpha=8, target_modules=("k_proj", "up_proj"), seed=4),
    AdapterSpec("attention-r16", rank=16, alpha=8, target_modules=ATTENTION, seed=5),
    AdapterSpec("mlp-r24", rank=24, alpha=48, target_modules=MLP, seed=6),
    AdapterSpec("all-r32", rank=32, alpha=32, target_modules=ALL_LINEAR, seed=7),
    AdapterSpec("all-r64", rank=64, alpha=32, target_modules=ALL_LINEAR, seed=8),
)


class Pins:
    """Counts what asks torch for page-locked memory, and gives it plain memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in host_memory._FACTORIES:
            monkeypatch.setattr(torch, name, self._counted(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, _=None: self._pin(tensor))

    def _counted(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(factory)
        def plain(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            self.count += pin_memory
            return factory(*args, **kwargs)

        return plain

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return tensor


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> Pins:
    return Pins(monkeypatch)


@pytest.fixture(scope="module")
def files(checkpoint: Path, models: Path) -> dict[str, Path]:
    return make_adapters(checkpoint, models / "read", SPECS)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """What SGLang's layers and pool ask for the sizes of tensor parallelism."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.runtime_context import get_parallel
    with get_parallel().override(tp_size=1, tp_rank=0, attn_tp_size=1, attn_tp_rank=0):
        yield


@pytest.fixture
def manager(checkpoint: Path, pins: Pins, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our LoRA manager as far as it reads files: SGLang's layers, its loader and our pool."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sglang.srt.layers.linear import (
            MergedColumnParallelLinear,
            QKVParallelLinear,
            RowParallelLinear,
        )
        from sglang.srt.lora.layers import get_lora_layer
        from sglang.srt.lora.lora import LoRAAdapter
        from transformers import AutoConfig

        from sglang_elora.srt.lora import adapter_weights, lora_manager
        from sglang_elora.srt.lora.lora_pool import PagedLoRAPool
        from sglang_elora.srt.lora.torch_backend import EloraTorchBackend
    init, normalize = LoRAAdapter.__init__, LoRAAdapter._normalize_weights

    def hooked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        adapter_weights.scale_rslora(None, self, *args, **kwargs)

    def hooked_normalize(self: Any) -> None:
        adapter_weights.complete_fused_modules(self)
        normalize(self)

    monkeypatch.setattr(LoRAAdapter, "__init__", hooked_init)
    monkeypatch.setattr(LoRAAdapter, "_normalize_weights", hooked_normalize)
    config = AutoConfig.from_pretrained(checkpoint)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    backend = EloraTorchBackend(
        1,
        torch.device("cpu"),
        max_adapters=8,
        server_args=SimpleNamespace(enable_deterministic_inference=False),
    )
    here: dict[str, Any] = {"bias": False, "params_dtype": torch.float32}
    layers = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        modules = {
            "self_attn.qkv_proj": QKVParallelLinear(
                hidden, hidden // heads, heads, kv_heads, **here
            ),
            "self_attn.o_proj": RowParallelLinear(hidden, hidden, **here),
            "mlp.gate_up_proj": MergedColumnParallelLinear(hidden, [inner, inner], **here),
            "mlp.down_proj": RowParallelLinear(inner, hidden, **here),
        }
        layers.append(
            {f"{prefix}.{name}": get_lora_layer(m, backend) for name, m in modules.items()}
        )
    made = object.__new__(lora_manager.EloraLoRAManager)
    made.base_model = torch.nn.ModuleList(m for by_name in layers for m in by_name.values())
    made.base_model.config = config
    made.base_hf_config, made.load_config, made.lora_backend = config, None, backend
    made.lora_modules, made.dtype = layers, torch.float32
    made.memory_pool = PagedLoRAPool(
        base_hf_config=config,
        max_loras_per_batch=1,
        dtype=torch.float32,
        max_lora_rank=64,
        target_modules={"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        base_model=made.base_model,
        eviction_policy="lru",
        lora_added_tokens_size=0,
        strict_loading=False,
        modules=layers,
    )
    made.memory_pool.pin_memory_available = True  # as on CUDA
    made.embed_tokens_module = made.lm_head_module = None
    made.update_lora_info()
    made.memory_pool.set_model(None, None, pool_layers=len(layers))
    made.residency = SimpleNamespace(planes=SimpleNamespace(num_planes=2))
    made.configs = {}
    pins.count = 0  # SGLang's layers pin their tables, once
    return made


def source_of(manager: Any, name: str, path: Path) -> Any:
    """As ``load_lora_weights`` makes it from the file's headers."""
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_registry import LoRARef

    ref = LoRARef(lora_id=name, lora_name=name, lora_path=str(path), pinned=False)
    manager.configs[name] = LoRAConfig(str(path))
    return manager._source_of(ref)


def ordinary(num_bytes: int) -> list[torch.Tensor]:
    return [torch.empty(num_bytes, dtype=torch.uint8)]


def fragmented(num_bytes: int, block_bytes: int = BLOCK) -> HostArena:
    """An arena with so many bytes free, in runs of one block."""
    arena = HostArena(lazy_memory(2 * (num_bytes + 2 * block_bytes)), block_bytes)
    taken = [arena.take(block_bytes) for _ in range(arena.num_blocks)]
    for blocks in taken[::2]:
        assert blocks is not None
        arena.give_back(blocks)
    return arena


@pytest.mark.parametrize("name", ["qv-r4", "all-r64", "rslora-r8", "k-and-up"])
def test_image_read_into_scattered_blocks_equals_ordinary_memory(
    manager: Any, pins: Pins, files: dict[str, Path], name: str
) -> None:
    source = source_of(manager, name, files[name])
    assert source.read is not None
    plain = source.read(ordinary(source.num_bytes))
    blocks = fragmented(source.num_bytes).take(source.num_bytes)
    assert blocks is not None and len(blocks.chunks) == blocks.num_blocks > 1
    image = source.read(blocks.chunks)
    assert image.version == plain.version and image.layout == source.layout
    assert image.nbytes == source.num_bytes
    for layer in range(plain.num_layers):
        assert torch.equal(image.layer(layer), plain.layer(layer))
    assert plain.layer(0).count_nonzero() > 0
    assert pins.count == 0


def test_competing_reads_pin_no_memory_and_stay_within_the_arena(
    manager: Any, pins: Pins, files: dict[str, Path]
) -> None:
    """Ranks 4 to 64 in an arena that is little larger than the largest of them."""
    sources = {name: source_of(manager, name, path) for name, path in files.items()}
    budget = 5 * max(source.num_bytes for source in sources.values()) // 4
    rng, used, position = random.Random(0), dict.fromkeys(sources, 0.0), dict[str, float]()
    tier = HostTier(
        HostArena(lazy_memory(budget), BLOCK),
        lambda adapter_id: float("inf") if adapter_id in position else used[adapter_id],
        lambda adapter_id: position.get(adapter_id, float("inf")),
    )
    for adapter_id, source in sources.items():
        tier.add(adapter_id, source.num_bytes, source.read)
    for step in range(150):
        position = {
            adapter_id: float(i) for i, adapter_id in enumerate(rng.sample(list(sources), 2))
        }
        while position:
            for adapter_id in position:
                tier.request(adapter_id)
            settle_all(tier)
            for adapter_id in [adapter_id for adapter_id in position if adapter_id in tier]:
                del position[adapter_id]  # copied to the device at once
                used[adapter_id] = float(step)
                tier.lower(adapter_id)
            tier.drop_surplus()
        held = tier.arena.num_blocks - tier.arena.num_free
        assert held * BLOCK <= budget
    tier.check_invariants()
    assert tier.num_reads > 100 and tier.num_dropped > 100 and tier.num_outside == 0
    assert pins.count == 0


def settle_all(tier: HostTier) -> None:
    while tier.reading:
        for adapter_id in tier.reading:
            if (code := tier.code(adapter_id)) != Read.UNDER_WAY:
                assert isinstance(tier.settle(adapter_id, code), AdapterImage)
        time.sleep(0.0005)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory"),
        MemoryError("no memory"),
    ],
)
def test_out_of_memory_while_reading_is_not_reported_as_a_changed_file(
    manager: Any, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from sglang_elora.srt.lora import lora_pool

    def no_memory(*_: Any) -> Any:
        raise error

    source = source_of(manager, "qv-r4", files["qv-r4"])
    monkeypatch.setattr(lora_pool._Staging, "_entry", no_memory)
    with pytest.raises(type(error)) as raised:
        source.read(ordinary(source.num_bytes))
    assert raised.value is error


def changed(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    save_file({n: change(n, t).contiguous() for n, t in tensors.items()}, folder / WEIGHTS)


def narrower(part: str, factor: str, dim: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    is_meant = part in name and f"lora_{factor}" in name
    return tensor.narrow(dim, 0, tensor.shape[dim] - 1) if is_meant else tensor


@pytest.mark.parametrize(
    ("part", "factor", "dim"),
    [
        ("k_proj", "A", 1),  # torch cannot stack it with q_proj and v_proj
        ("up_proj", "A", 1),
        ("proj", "A", 0),  # another rank
        ("v_proj", "B", 1),
        ("v_proj", "B", 0),  # other rows than the model has
        ("o_proj", "A", 1),
    ],
)
def test_read_reports_changed_tensor_shapes_as_a_changed_file(
    manager: Any, files: dict[str, Path], tmp_path: Path, part: str, factor: str, dim: int
) -> None:
    folder = Path(shutil.copytree(files["all-r4"], tmp_path / "own"))
    source = source_of(manager, "own", folder)
    changed(folder, partial(narrower, part, factor, dim))
    with pytest.raises(ValueError, match="its file has changed since it was loaded") as raised:
        source.read(ordinary(source.num_bytes))
    assert type(raised.value).__name__ == "AdapterChanged"


def test_read_reports_missing_modules_as_a_changed_file(
    manager: Any, files: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(files["all-r4"], tmp_path / "own"))
    source = source_of(manager, "own", folder)
    (folder / WEIGHTS).write_bytes((files["qv-r4"] / WEIGHTS).read_bytes())
    chunks = ordinary(source.num_bytes)
    with pytest.raises(ValueError, match="its file has changed"):
        source.read(chunks)


def test_staging_memory_is_freed_when_a_read_ends(
    manager: Any, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its last reference: the collector of cycles may not run for minutes in a server."""
    from sglang_elora.srt.lora import lora_pool

    made: list[weakref.ref[torch.Tensor]] = []
    entry = lora_pool._Staging._entry

    def remembered(self: Any, *args: Any) -> torch.Tensor:
        tensor: torch.Tensor = entry(self, *args)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(lora_pool._Staging, "_entry", remembered)
    source = source_of(manager, "all-r4", files["all-r4"])
    gc.collect()
    gc.disable()
    try:
        source.read(ordinary(source.num_bytes))
        alive = [ref for ref in made if ref() is not None]
    finally:
        gc.enable()
    assert made and not alive
