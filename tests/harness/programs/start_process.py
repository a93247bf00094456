"""Starts one of SGLang's processes up to where its plugins are loaded, and prints what is there."""

import json
import os
import sys

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
from importlib import import_module

module, process = import_module(sys.argv[1]), sys.argv[2]
before = "sglang.srt.managers.scheduler" in sys.modules


def after_plugins(*_, **__):
    from sglang.srt.plugins.hook_registry import HookRegistry

    print(
        json.dumps(
            [
                before,
                "sglang.srt.managers.scheduler" in sys.modules,
                "sglang_elora.srt.install.install" in sys.modules,
                len(HookRegistry._hooks),
            ]
        ),
        flush=True,
    )
    os._exit(0)


module.publish = after_plugins  # what each of them does next, or before that the scheduler:
module.spawn_world_rank = after_plugins
module.configure_logger = lambda *_, **__: None
getattr(module, process)(*[None] * int(sys.argv[3]))
