"""--elora-check-streams ends the server where a wait between streams, or a pin, is missing.

Each mutation removes one of them by a plugin of its own; what is left is the product. Outputs of
the unchanged product under the same orders are compared in test_pressure.py. PRESSURE_FULL=1 in
the environment tries all mutations.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import httpx
import pytest

from sglang_elora.testbed.server import ServerProcess, ServerStartError
from tests.e2e.test_pressure import VARIANTS, Variant
from tests.harness.plugin_packages import write_plugin
from tests.harness.pressure import Model, make_model, make_trace, run_trace
from tests.harness.server_flags import server_flags

NO_WAIT_BEFORE_SLOTS = """
from sglang_elora.srt.mem_cache.free_order import FreeOrder
FreeOrder.wait = lambda self, stream: None
"""

NO_WAIT_FOR_A_LAYER = """
from sglang_elora.swapper.adapter_copy import AdapterCopy
AdapterCopy.wait_layer = lambda self, layer: None
"""

EVENT_BEFORE_ITS_COPY = """
from sglang_elora.srt.mem_cache.copy_stream import CopyStream
original = CopyStream._queue
def queue(self, copy, image, slots):
    paged = original(self, copy, image, slots)
    ends, events = zip(*copy.pieces)
    copy.pieces[:] = zip(ends, [copy.begun, *events[:-1]])
    return paged
CopyStream._queue = queue
"""

IMAGE_NOT_HELD = """
from sglang_elora.swapper.host_tier import HostTier
HostTier.hold = HostTier.get
HostTier.release = lambda self, uid: None
"""

LOAD_OF_A_SESSION_NOT_AWAITED = """
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang_elora.srt.mem_cache import radix_cache
cache = radix_cache.EloraRadixCache
cache.ready_to_load_host_cache = UnifiedRadixCache.ready_to_load_host_cache
"""

BACKUP_NOT_AWAITED = """
import torch
from sglang.srt.managers.cache_controller import HiCacheController
original = HiCacheController.start_writing
def start_writing(self):
    had = len(self.ack_write_queue)
    original(self)
    for i in range(had, len(self.ack_write_queue)):
        self.ack_write_queue[i] = self.ack_write_queue[i]._replace(finish_event=torch.cpu.Event())
HiCacheController.start_writing = start_writing
"""

MOST_RUNS = 3
"""Of the trace: on a machine that others use, what would race may be over before it is met."""

RACE = "RaceError: nothing orders a"
MUTATIONS = {
    "no wait before slots": (NO_WAIT_BEFORE_SLOTS, "earliest", "pages-chunks-aborts", RACE),
    "no wait for a layer": (NO_WAIT_FOR_A_LAYER, "latest", "plain", RACE),
    "event before its copy": (EVENT_BEFORE_ITS_COPY, "latest", "plain", RACE),
    "image not held": (IMAGE_NOT_HELD, "latest", "plain", "may be dropped"),
    "load of a session not awaited": (LOAD_OF_A_SESSION_NOT_AWAITED, "latest", "sessions", RACE),
    "backup not awaited": (BACKUP_NOT_AWAITED, "latest", "sessions", RACE),
}
"""Name -> (what a plugin changes, order of streams, variant of the pressure, what the log says).

Slots in pages are handed out again at once, single ones last of all."""

IN_CI = ("load of a session not awaited", "no wait for a layer")
TRIED = list(MUTATIONS) if "PRESSURE_FULL" in os.environ else IN_CI


@pytest.mark.parametrize("name", TRIED)
def test_missing_wait_or_pin_ends_the_server_and_is_named(
    name: str, models: Path, logs: Path, tmp_path: Path
) -> None:
    body, order, variant, says = MUTATIONS[name]
    write_plugin(tmp_path, "mutation", body)
    model = make_model(models, small="PRESSURE_FULL" not in os.environ)
    log_path = logs / f"{name}.log"
    log = _log_of_a_run(
        VARIANTS[variant],
        order,
        model,
        log_path,
        tmp_path,
    )
    assert says in log, log[-3000:]
    print(log[log.index(says) :][:1200])


def _log_of_a_run(
    variant: Variant,
    order: str,
    model: Model,
    log_path: Path,
    plugin: Path,
) -> str:
    flags = [
        *("--elora", "--elora-check", "--elora-check-streams", order),
        *server_flags(model.checkpoint),
        *("--max-total-tokens", str(variant.pool_tokens), *variant.flags),
        *("--lora-paths", *(f"{name}={path}" for name, path in model.adapters.items())),
    ]
    path = os.pathsep.join(filter(None, (str(plugin), os.environ.get("PYTHONPATH"))))
    env = {**variant.env, "PYTHONPATH": path}
    with (
        contextlib.suppress(httpx.HTTPError, AssertionError, ServerStartError),
        ServerProcess(flags, log_path=log_path, env=env) as server,
    ):
        for _ in range(MOST_RUNS):
            run_trace(
                server.url,
                make_trace(num_requests=150),
                abort_every=variant.abort_every,
                names_sessions=variant.names_sessions,
            )
    return log_path.read_text()
