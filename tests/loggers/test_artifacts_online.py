"""Artifacts online: the real client uploads them to the stand-in server, and another run uses one of them."""

import json
import os
import subprocess
import sys

import pytest
from wandb_server import Server

CODE = """
import sys
from pathlib import Path
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.artifacts import artifact_name, publish_run, version
from ldm.runs.folder import RunFolder

run = RunFolder(Path(sys.argv[1], "chain", "autoencoder"))
checkpoints = run.folder / "checkpoints"
checkpoints.mkdir(parents=True)
for name in ("last", "best"):
    (checkpoints / f"{name}.ckpt").write_text(name)
def log(name):
    return WandbSamplesLogger(dict, {"project": "ldm", "save_dir": str(run.folder), "id": name})
first, second = log("first"), log("second")
publish_run([first], run, "autoencoder", {"samples": 3})
assert first.end(0, 20, lambda: False)
second.use({artifact_name(run.folder): "best", "chain-gone": version("0" * 64)}, "built_on")
assert second.end(0, 20, lambda: False)
"""


@pytest.mark.slow
def test_a_chain_is_drawn_and_an_artifact_that_is_not_there_is_a_warning(tmp_path):
    with Server() as server:
        home = {"HOME": str(tmp_path), "WANDB_SILENT": "true"}
        call = [sys.executable, "-c", CODE, str(tmp_path)]
        environment = {**os.environ, **server.environment, **home}
        done = subprocess.run(call, check=True, env=environment, capture_output=True, text=True)
        ((name, artifact),) = server.artifacts.items()
        aliases = [each["alias"] for each in artifact["aliases"]]
        assert {"latest", "best"} < set(aliases) and len(aliases) == 4
        assert artifact["artifactCollectionName"] == "chain-autoencoder"
        assert artifact["state"] == "COMMITTED" and json.loads(artifact["metadata"])["samples"] == 3
        assert artifact["runName"] == "first"
        files = server.runs[name].files
        assert {"last.ckpt": b"last", "best.ckpt": b"best"}.items() <= files.items()
        assert server.runs["second"].used == [name]
    assert done.stderr.count("no lineage from chain-gone") == 1
