"""Checkpoints from W&B in commands and runs: what is recorded, and what a resumed run goes on with."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from tiny_runs import ROOT, SUPPORT, Chain
from wandb_server import Server

from ldm import compare, evaluate, fit, sample
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import sha256
from ldm.runs.artifacts import version

pytestmark = pytest.mark.slow
LATEST, EXACT = "wandb:me/ldm/demo-clip:latest", "wandb:me/ldm/demo-clip:v0"


def published(server, run, **changes):
    """Keep a run's last checkpoint and records; returns its SHA-256."""
    last = run / "checkpoints" / "last.ckpt"
    files = {"last.ckpt": last, "config.yaml": run / "config.yaml", "metrics.csv": run / "metrics.csv"}
    contents = {name: path.read_bytes() for name, path in files.items()} | changes
    server.keep_artifact(f"demo-{run.name}", contents, [version(sha256(last))])
    return sha256(last)


@pytest.fixture(scope="module")
def server(chain):
    with Server() as server:
        server.sha256 = {
            name: published(server, chain.runs / name) for name in ("autoencoder", "clip", "diffusion")
        }
        yield server


@pytest.fixture
def elsewhere(server, tmp_path, monkeypatch):
    """A working directory without runs, and an empty cache."""
    for name, value in {**server.environment, "LDM_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_take_references_and_record_exact_versions(chain, server, elsewhere):
    model = "wandb:me/ldm/demo-diffusion:latest"
    upstream = ["--upstream", *(f"{name}=wandb:me/ldm/demo-{name}:v0" for name in ("autoencoder", "clip"))]
    more = ["--prompt=a red ring", "--steps=1", "--device=cpu", "--out=drawn", *upstream]
    assert sample.main([f"--checkpoint={model}", *more]) == 0
    with Image.open(elsewhere / "drawn" / "000000.png") as image:
        assert image.text["checkpoint"] == "wandb:me/ldm/demo-diffusion:v0"
        assert image.text["checkpoint_sha256"] == server.sha256["diffusion"]
    shards = ["--data", str(chain.shards / "val-000000.tar"), "--num-images=4", "--device=cpu"]
    assert evaluate.main([f"--checkpoint={LATEST}", *shards, "--out=measured"]) == 0
    (result,) = json.loads((elsewhere / "measured" / "evaluation.json").read_text())["results"]
    assert EXACT in json.dumps(result)
    assert compare.main([LATEST, model, "--out=page.html"]) == 0
    assert "demo-diffusion:latest" in (elsewhere / "page.html").read_text()


def test_a_run_draws_its_lineage_and_goes_on_with_what_it_began_with(chain, server, elsewhere):
    run = Chain(elsewhere / "runs", chain.shards, chain.latents)
    given = [f"--model.conditioner.checkpoint={LATEST}", "--trainer.limit_val_batches=0"]
    train = run.arguments("pixels", *given, "--trainer.max_steps=2", "--wandb.mode=online")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}", "HOME": str(elsewhere)}
    call = [sys.executable, "-m", "ldm.fit", *train]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and not done.stderr, done.stderr
    folder = run.runs / "pixels"
    tracked = server.runs[(folder / "wandb-id.txt").read_text().split("\n")[0]]
    (used,) = tracked.used
    assert server.artifacts[used]["artifactCollectionName"] == "demo-clip"
    assert tracked.settings["used"] == {"me/ldm/demo-clip": "v0"}
    assert tracked.settings["model.conditioner.checkpoint"] == EXACT
    recorded = json.loads((folder / "artifacts.json").read_text())
    assert recorded == {LATEST: {"exact": EXACT, "digest": server.artifacts[used]["digest"]}}
    config = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
    assert config["conditioner"]["init_args"]["checkpoint"] == EXACT
    before = Checkpoint.open(folder)
    assert before.upstream == {EXACT: server.sha256["clip"]}
    published(server, chain.runs / "clip", **{"config.yaml": b"another: 1"})
    assert [each["version"] for each in server.artifacts.values()] == [0, 0, 0, 1]
    server.mode = "cut"
    shutil.rmtree(elsewhere / "cache")
    assert fit.main(run.arguments("pixels", *given, "--trainer.max_steps=4")) == 0
    after = Checkpoint.open(folder)
    assert after.progress.steps == 4 and after.upstream == before.upstream
    server.mode = "well"
