"""Holds a fake server until it is killed."""

import sys
import time
from pathlib import Path

from sglang_elora.testbed.server import ServerProcess, python_module

program = python_module("fake_server")
with ServerProcess([], program=program, log_path=Path(sys.argv[1]), stop_timeout_s=1.0):
    print("up", flush=True)
    time.sleep(600)
