"""A process that holds the lock of a folder: ``python tests/support/holding.py FOLDER [HOST]``."""

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

QUICK = {"HEARTBEAT": 0.2, "LEASE": 1.0}
"""Seconds in ``ldm.io.lock``; equal for all processes that use a folder."""


@contextmanager
def holder(folder, host=None):
    """Start it and wait until it holds the lock; kill it after the ``with`` block.

    Args:
        folder: The folder.
        host: Node that it claims to run on, whose processes cannot be listed here; None: this one.
    """
    command = [sys.executable, __file__, str(folder), *([host] if host else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def main():
    import filelock._soft._exclusive._marker as marker

    from ldm.io import lock

    if len(sys.argv) > 2:
        marker.host_name = lambda: sys.argv[2]
    vars(lock).update(QUICK)
    with lock.held(Path(sys.argv[1]), "--run"):
        print("held", flush=True)
        time.sleep(100)


if __name__ == "__main__":
    main()
