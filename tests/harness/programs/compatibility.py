"""Questions to ELORA's checks of SGLang's arguments, in a process in which plugins are loaded.

Called with a model's folder, the name of a function below and its arguments as JSON; prints what it
returns as JSON.
"""

import copy
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.server_args import prepare_server_args

from sglang_elora import config
from sglang_elora.srt.arguments import compatibility, model_kinds


def resolve(*flags):
    server_args = prepare_server_args(["--model-path", sys.argv[1], *flags])
    server_args.resolve_once()
    return server_args


def change(server_args, raw=None, model=None, env=None, **fields):
    changed = copy.copy(server_args)
    changed._raw_input = {**server_args._raw_input, **(raw or {})}
    changed._resolved_overrides = list(server_args._resolved_overrides)
    declare_resolution(changed, "test", **fields)
    changed._model_config = copy.deepcopy(model_config_of(server_args))
    for name, value in (model or {}).items():
        if "experts" in name:
            setattr(changed._model_config.hf_text_config, name, value)
        elif name == "architectures":
            changed._model_config.hf_config.architectures = value
        else:
            assert hasattr(changed._model_config, name), name
            value = AttentionArch[value] if name == "attention_arch" else value
            setattr(changed._model_config, name, value)
    return changed


def problems(server_args, env=None):
    os.environ.update(env or {})
    try:
        compatibility.check_compatible(server_args)
    except ValueError as error:
        return str(error).splitlines()[1:]
    finally:
        for name in env or {}:
            del os.environ[name]
    return []


def every_refusal(lora, cases):
    base = resolve(*lora)
    lines, seen = [], set()
    for case in cases:
        changed = change(base, **case)
        os.environ.update(case.get("env", {}))
        view = resolving_view(changed)
        seen |= {i for i, r in enumerate(compatibility.REFUSALS) if r.applies(view)}
        lines.append(problems(changed, case.get("env")))
    missing = [r.name for i, r in enumerate(compatibility.REFUSALS) if i not in seen]
    return lines, missing


def real_flags(lora):
    flags = ["--lora-backend", "triton", "--enable-lora-overlap-loading"]
    flags += ["--lora-drain-wait-threshold", "2", "--max-loaded-loras", "64"]
    flags += ["--disable-radix-cache"]
    return (
        problems(resolve(*lora, *flags)),
        problems(resolve(*flags)),
        problems(resolve("--lora-paths", "a=/none", "--disable-radix-cache")),
    )


def data_parallel_attention(lora):
    spellings = [["--attn-dp-size", "2"], ["--enable-dp-attention", "--dp-size", "2"]]
    return [problems(resolve(*lora, "--tp-size", "2", *flags)) for flags in spellings]


def fields_without_a_flag():
    from sglang.srt.server_args import ServerArgs

    fields = get_type_hints(ServerArgs, include_extras=True)
    source = "".join(Path(file.__file__).read_text() for file in (compatibility, model_kinds))
    looked_at = {
        *re.findall(r"\bcfg\.([a-z]\w*)", source),
        *re.findall(r'_raw_input\["(\w+)"\]', source),
    }

    def has_flag(name):
        return name in fields and not any(
            getattr(argument, "no_cli", False) for argument in fields[name].__metadata__
        )

    found = {name: has_flag(name) for name in sorted(looked_at)}
    return found, fields["enable_dp_attention"].__metadata__[0].no_cli


def adapter_events(lora):
    config.activate(config.EloraConfig(enabled=True, adapter_events=True))
    events = ["--kv-events-config", '{"publisher": "zmq"}']
    found = []
    for flags in (lora, events, [*lora, *events]):
        try:
            compatibility.check_compatible(resolve(*flags))
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def flags_about_slots(lora):
    heard = []
    compatibility.logger.info = lambda text, *values: heard.append(text % values)
    few = resolve(*lora, "--max-loaded-loras", "4")
    compatibility.check_compatible(few)
    few.check_server_args()
    flags = ["--max-loras-per-batch", "3", "--lora-eviction-policy", "fifo"]
    slots = resolve(*lora, *flags, "--radix-eviction-policy", "lfu")
    quiet = list(heard)
    compatibility.check_compatible(slots)
    slots.check_server_args()
    return quiet, heard, resolving_view(few).max_loaded_loras


def lora_backends(lora):
    from sglang_elora.srt.arguments import selection
    from sglang_elora.srt.lora import registry

    registry.register_backends(max_adapters=256)
    by_name = [[*lora, "--lora-backend", name] for name in ("elora_torch", "elora_triton")]
    found = []
    for cuda in (False, True):
        selection.is_cuda = lambda cuda=cuda: cuda
        for flags in (lora, *by_name, []):
            server_args = resolve(*flags, "--cuda-graph-backend-decode", "full")
            selection.select_parts(None, server_args)
            cfg = resolving_view(server_args)
            found.append([cfg.lora_backend, cfg.cuda_graph_config.decode.backend])
    return found


def fuses_shared_experts():
    from sglang_elora.srt.arguments import selection
    from sglang_elora.srt.lora import registry

    registry.register_backends(max_adapters=256)
    found = []
    for modules in (["q_proj", "o_proj"], ["q_proj", "down_proj"], ["up_proj"], ["all"]):
        named = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *modules]
        server_args = resolve(*named, "--cuda-graph-backend-decode", "full")
        selection.select_parts(None, server_args)
        found.append(not resolving_view(server_args).disable_shared_experts_fusion)
    return found


def pools():
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import (
        HybridLinearKVPool,
        MHATokenToKVPool,
        MLATokenToKVPool,
        MLATokenToKVPoolFP4,
    )
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    def refusal(
        pool_class=MHATokenToKVPool,
        layout="nhd",
        quant_method=None,
        use_dsa=False,
        whole_class=None,
        allocator_class=TokenToKVPoolAllocator,
        full_layers=1,
        **state,
    ):
        pool = object.__new__(pool_class)
        pool.use_dsa = use_dsa
        pool.kv_cache_layout = layout
        pool.quant_method = quant_method or UnquantizedKVCacheMethod()
        whole = pool if whole_class is None else object.__new__(whole_class)
        whole.full_kv_pool, whole.full_layer_nums = pool, full_layers
        allocator = object.__new__(allocator_class)
        allocator._kvcache = whole
        defaults = {"disable_radix_cache": False}
        ctx = SimpleNamespace(
            params=SimpleNamespace(token_to_kv_pool_allocator=allocator), **{**defaults, **state}
        )
        try:
            compatibility.check_pool(ctx)
        except ValueError as error:
            return str(error)
        return ""

    return (
        refusal(),
        refusal(pool_class=MLATokenToKVPool),
        refusal(whole_class=HybridLinearKVPool),
        refusal(whole_class=SWAKVPool, allocator_class=SWATokenToKVPoolAllocator),
        refusal(pool_class=MLATokenToKVPool, use_dsa=True),
        refusal(pool_class=MLATokenToKVPoolFP4),
        refusal(layout="hnd"),
        refusal(quant_method=object()),
        refusal(whole_class=SWAKVPool),
        refusal(whole_class=SWAKVPool, allocator_class=SWATokenToKVPoolAllocator, full_layers=0),
        refusal(disable_radix_cache=True),
    )


print(json.dumps(globals()[sys.argv[2]](*map(json.loads, sys.argv[3:]))))
