"""Ray on this machine alone. On a cluster, ``ray.init()`` and ``serve.run(app.application(...))``
do, and Ray starts nothing of what is here."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_elora.testbed.server import HOST

NAME = "elora"  # of the application

# Ray reads it when it is imported. Whatever its name says: with 0 the node's address is 127.0.0.1,
# and Ray's own processes listen there instead of on all interfaces. Serve's replicas do not: each
# opens a port for calls between deployments on all of them, which no option changes.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's default is 15, which the servers would inherit: every other process would have priority.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import ray  # noqa: E402
from ray import serve  # noqa: E402


@contextmanager
def local_ray(port: int) -> Iterator[str]:
    """Ray, and Serve's proxy at the address that the context returns; all of it ends with it."""
    here = str(Path(__file__).parent)  # Ray's workers import ``app`` and ``routing``
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    folder = tempfile.mkdtemp(prefix="serve-")  # short: a socket's path has 107 characters at most
    try:
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
            _temp_dir=folder,
        )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="HeadOnly", http_options={"host": HOST, "port": port})
        yield f"http://{HOST}:{port}"
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def replicas() -> list[dict[str, Any]]:
    """What each running replica says of itself: ``replica``, ``url`` and ``pid`` of its server."""
    engines = serve.get_deployment_handle("Engine", NAME)
    answers = engines.broadcast("describe").results(timeout_s=30, return_exceptions=True)
    found = [answer for answer in answers if isinstance(answer, dict)]  # others are ending
    return sorted(found, key=lambda replica: replica["replica"])


def front_counts() -> dict[str, int]:
    """Requests repeated on another replica, answers broken off, requests without a replica."""
    counts: dict[str, int] = serve.get_app_handle(NAME).counts.remote().result()
    return counts
