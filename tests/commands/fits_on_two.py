"""Run several command lines of ldm.fit on the same two processes, one after another: see test_fsdp.py."""

import json
import os
import sys
from pathlib import Path

import torch

from ldm import fit


def main(plan):
    for step in json.loads(Path(plan).read_text()):
        if step["start"] and int(os.environ.get("LOCAL_RANK", 0)) == 0:
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
