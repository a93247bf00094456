"""--elora-check-streams ends the server where a wait between streams, or a pin, is missing.

Each mutation removes one of them by a plugin; what is left is the product. Outputs of
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
from tests.harness.plugin_packages import install_plugin
from tests.harness.pressure import Model, make_model, make_trace, run_trace
from tests.harness.server_flags import server_flags

MOST_RUNS = 3
"""Of the trace: on a machine that others use, what would race may be over before it is met."""

RACE = "RaceError: nothing orders a"
MUTATIONS = {
    "no wait before slots": ("earliest", "pages-chunks-aborts", RACE),
    "no wait for a layer": ("latest", "plain", RACE),
    "event before its copy": ("latest", "plain", RACE),
    "image not held": ("latest", "plain", "may be dropped"),
    "load of a session not awaited": ("latest", "sessions", RACE),
    "backup not awaited": ("latest", "sessions", RACE),
}
"""Function of the plugin -> (order of streams, variant of the pressure, what the log says).

Slots in pages are handed out again at once, single ones last of all."""

IN_CI = ("load of a session not awaited", "no wait for a layer")
TRIED = list(MUTATIONS) if "PRESSURE_FULL" in os.environ else IN_CI


@pytest.mark.parametrize("name", TRIED)
def test_stream_check_ends_the_server_naming_a_missing_wait_or_pin(
    name: str, models: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, variant, says = MUTATIONS[name]
    install_plugin(tmp_path, "missing_waits")
    monkeypatch.setenv("MISSING_WAIT", name.replace(" ", "_"))
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
