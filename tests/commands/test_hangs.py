"""A process that stands still, for hours if it is let, ends the run for all, by its name."""

import os
import re
import subprocess
import sys

import pytest
from tiny_runs import ROOT, SUPPORT

from ldm.callbacks.heartbeat import EXIT_CODE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "reason"),
    [
        (1, "stop", r"process 1 \(.*\) cannot be heard: killed, stopped, or cut off"),
        (0, "sleep", r"process 0 \(.*\) stands after step 3.*, and the others wait for it"),
    ],
)
def test_a_hang_ends_all_and_names_who_stands_still(fresh, rank, how, reason):
    hangs = ["interruptions.Hangs", "--trainer.callbacks.step=3", f"--trainer.callbacks.rank={rank}"]
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--sample_grid.num=2"]
    more = ["--trainer.callbacks+", *hangs, f"--trainer.callbacks.how={how}", "--watchdog.timeout=20"]
    command = [sys.executable, "-m", "ldm.fit", *fresh.arguments("autoencoder", *options, *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{SUPPORT}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode != 0
    message = rf"no progress for \d+ s \(--watchdog.timeout 20\): {reason}"
    assert re.search(message, result.stderr), result.stderr
    if how == "sleep":
        assert result.returncode == EXIT_CODE
        assert "wait_for_nothing" in result.stderr  # the very line
