"""Artifacts online, and sent later: the real client, and the stand-in for its server."""

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


OFFLINE = """
import sys
from pathlib import Path
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.artifacts import publish_latents, publish_run
from ldm.runs.folder import RunFolder
from ldm.runs.options import WandB

home = Path(sys.argv[1])
run, shards = RunFolder(home / "chain" / "autoencoder"), home / "shards" / "latents"
def log(folder, kind):
    return folder.wandb(WandB(), kind, "chain")
checkpoints = run.folder / "checkpoints"
checkpoints.mkdir(parents=True)
(run.folder / "config.yaml").write_text("model: {class_path: ldm.stages.Autoencoder}")
for content in ("first", "second"):
    (checkpoints / "last.ckpt").write_text(content)
    (checkpoints / "best.ckpt").write_text("the best")
    publish_run([logger := log(run, "autoencoder")], run, "autoencoder", {"samples": 3})
    assert logger.end(0, 20, lambda: False)
shards.mkdir(parents=True)
for name in ("latents.json", "a.tar"):
    (shards / name).write_text("{}")
from ldm.io.weights import sha256
source = {"checkpoint": str(run.folder), "sha256": sha256(run.last)}
publish_latents(logger := log(RunFolder(shards), "encode"), shards, {"autoencoder": source})
assert logger.end(0, 20, lambda: False)

from ldm.runs.sending import send
folders = (run.folder, shards)
noted = {folder / "wandb" / "outbox.jsonl": None for folder in folders}
noted = {path: path.read_text() for path in noted}
for number in range(3):
    print(*(send(folder, 100) for folder in folders), sep=", ", flush=True)
    sys.stdin.readline()
    if number == 1:  # as if it had been killed before it crossed them out
        [path.write_text(text) for path, text in noted.items()]
"""


@pytest.mark.slow
def test_what_was_published_offline_is_sent_later_once(tmp_path):
    with Server() as server:
        environment = {**os.environ, **server.environment, "HOME": str(tmp_path)}
        call = [sys.executable, "-c", OFFLINE, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(call, env=environment, **pipes) as process:
            said, found = [], []
            for _ in range(3):
                said.append(process.stdout.readline())
                versions = server.artifacts.values()
                found.append([(a["artifactCollectionName"], a["version"], aliases(a)) for a in versions])
                process.stdin.write("\n")
                process.stdin.flush()
        assert process.returncode == 0
        assert said == [
            "0 rows and 2 artifacts sent, 0 rows and 2 artifacts sent\n",
            "0 rows sent, 0 rows sent\n",
            said[0],
        ]
        (first, _, old), (second, _, new), (latents, _, _) = found[0]
        assert first == second == "chain-autoencoder" and latents == "shards-latents"
        assert {"latest", "best"} <= new and not {"latest", "best"} & old
        assert found[1] == found[2] == found[0]
        names = list(server.artifacts)
        sent = [server.runs[name].files.get("last.ckpt") for name in names]
        assert sent == [b"first", b"second", None]
        assert {name for run in server.runs.values() for name in run.used} == {names[1]}


def aliases(artifact):
    return {each["alias"] for each in artifact["aliases"]}
