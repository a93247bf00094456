"""``python guard.py <flags>`` runs a server, and ends all its processes when either of them ends.

Ray may kill a replica at any moment, also while its server starts. The kernel then sends SIGTERM to
this process (``setpriv --pdeathsig``); children that the server has only begun to start, which do
not watch their parent yet, are found by their session.
"""

from __future__ import annotations

import sys
from subprocess import Popen

from sglang_elora.testbed.process_tree import ProcessTree
from sglang_elora.testbed.server import ELORA_SERVER
from sglang_elora.testbed.signals import signals_ignored, sigterm_acts_as_ctrl_c

PATIENCE_S = 6.0  # SGLang checks for SIGTERM every 5 s


def main() -> int:
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


if __name__ == "__main__":
    sys.exit(main())
