"""Runs several command lines of ldm.fit in the same processes, one or two, one after another.

A process takes longer to import Lightning than to train for ten steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = str(Path(__file__))
ROOT = Path(__file__).resolve().parents[2]


def start(plan, file, home, **more):
    """Train the runs of a plan, on as many processes as their command lines state, and wait.

    Args:
        plan: For each run its ``arguments``; where it does not begin by itself also ``start``, the
            checkpoint that it resumes from, and ``run``, its folder.
        file: Where to write the plan.
        home: Folder in which they run.
        more: Variables of their environment.
    """
    file.write_text(json.dumps(plan))
    paths = f"{ROOT}:{Path(__file__).parent}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **more}
    command = [sys.executable, PROGRAM, str(file)]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=850)


def fit_all(plan, file, home, **more):
    """Train the runs of a plan; all must succeed."""
    result = start(plan, file, home, **more)
    assert result.returncode == 0, result.stderr
    return result


def main(plan):
    import torch

    from ldm import fit

    for step in json.loads(Path(plan).read_text()):
        if step.get("start") and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            target = Path(step["run"], "checkpoints", "last.ckpt")
            target.parent.mkdir(parents=True)
            target.write_bytes(Path(step["start"]).read_bytes())
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if (code := fit.main(step["arguments"])) != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
