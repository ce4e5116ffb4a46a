"""W&B's folders on disks that are full or read-only: one line, logging goes on, and all is sent later."""

import os
import subprocess
import sys

import pytest
from wandb_server import Server

pytestmark = pytest.mark.slow

MOUNTS = """
set -e
mkdir -p "$1/home" "$1/run/wandb"
mount -t tmpfs -o ro,size=16k none "$1/home"
mount -t tmpfs -o size=2m none "$1/run/wandb"
HOME="$1/home" exec "$2" -c "$3" "$1/run"
"""
CODE = """
import sys
from pathlib import Path
from ldm.loggers.metrics_csv import MetricsCSV
from ldm.runs.folder import RunFolder
from ldm.runs.options import WandB
from ldm.runs.sending import send

run = RunFolder(sys.argv[1])
run.folder.joinpath("config.yaml").write_text("model: {class_path: ldm.stages.Autoencoder}")
fill = run.folder / "wandb" / "fill"
def full():
    try:
        with fill.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
    except OSError:
        pass
def train(steps, begin, full_from, name):
    logs = run.wandb(WandB(mode="online"), "autoencoder"), MetricsCSV(str(run.folder))
    for step in range(begin, begin + steps):
        if step == full_from:
            full()
        if step == begin:
            logs[0].experiment.config.update({"a": 1})
            logs[0].keep_files(run.records)
        for log in logs:
            log.log_metrics({"samples": step, **{f"train/{i}": i / 7 for i in range(200)}}, step=step)
    print(name, logs[0].end(0, 15, lambda: False), file=sys.stderr, flush=True)
    fill.unlink()
train(20, 0, 0, "full when it begins")
train(200, 20, 40, "full later")
print(send(run.folder, 60))
"""


@pytest.fixture
def unshare():
    """A command that runs another with mounts of its own."""
    command = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts")
    return command


def test_a_full_disk_under_wandb_is_one_line_and_nothing_is_lost(unshare, tmp_path):
    with Server() as server:
        environment = {**os.environ, **server.environment}
        call = [*unshare, "bash", "-c", MOUNTS, "bash", str(tmp_path), sys.executable, CODE]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        (run,) = server.runs.values()
        assert [row["_step"] for row in run.rows] == [10 * step for step in range(220)]
    first, *later = done.stderr.splitlines()
    assert first.startswith(
        f"warning: W&B cannot write to '{tmp_path}/run/wandb' (No space left on device): "
    )
    assert f"'python -m ldm.sync {tmp_path}/run' sends the run" in first
    assert later[0] == "full when it begins False"
    assert len(later) in (2, 3) and later[-1].startswith("full later ")
    assert len(later) == 2 or later[1].startswith("warning: W&B")
