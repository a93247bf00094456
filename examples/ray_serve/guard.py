"""``python guard.py <flags>`` runs a server, and ends all its processes when it or the caller ends.

Ray may kill a replica at any moment, also while its server starts, and kills the replica's child
processes with it. So the child (1) has a child of its own, the guard (2), whose child is the server
(3). The kernel sends SIGTERM to (1) and (2) when their parent ends. Processes that the server has
only begun to start, and that do not watch their parent yet, are found by their session.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from subprocess import Popen

from sglang_elora.testbed.process_tree import ProcessTree
from sglang_elora.testbed.server import ELORA_SERVER
from sglang_elora.testbed.signals import signals_ignored, sigterm_acts_as_ctrl_c

PATIENCE_S = 6.0  # SGLang checks for SIGTERM every 5 s
PR_SET_PDEATHSIG = 1


def main() -> int:
    _sigterm_when_parent_ends()
    guard = os.fork()
    if guard == 0:
        _sigterm_when_parent_ends()
        return _guard()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(guard, signal.SIGTERM))
    return os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1])


def _guard() -> int:
    with sigterm_acts_as_ctrl_c():
        server = Popen([*ELORA_SERVER, *sys.argv[1:]], start_new_session=True)
        tree = ProcessTree(server.pid)
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            with signals_ignored():
                tree.end(PATIENCE_S)
                server.wait()


def _sigterm_when_parent_ends() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    sys.exit(main())
