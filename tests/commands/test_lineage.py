"""autoencoder -> latents -> diffusion in W&B, by the real client offline: what each command has stored."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from interruptions import signalled
from tiny_runs import ROOT, SUPPORT, Chain
from wandb_records import Records

from ldm import fit, training
from ldm.callbacks import lineage
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import sha256
from ldm.latents.manifest import MANIFEST
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.artifacts import artifact_name, publish_latents, publish_run, run_of
from ldm.runs.folder import RunFolder

TRACKED = ("--wandb.mode=offline", "--wandb.artifacts=true")


def in_a_process(command, arguments, home, code=0):
    """Run a command in a process of its own: W&B writes its file when the process ends."""
    paths = f"{ROOT}{os.pathsep}{SUPPORT}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": ""}
    call = [sys.executable, "-m", f"ldm.{command}", *arguments]
    result = subprocess.run(call, env=environment, cwd=home, capture_output=True, text=True, timeout=250)
    assert result.returncode == code, result.stderr


def stored(run):
    """Records of each time that the run was begun, in order."""
    identity = (run / "wandb-id.txt").read_text().split("\n")[0]
    return [Records(path) for path in sorted((run / "wandb").glob(f"offline-run-*-{identity}"))]


@pytest.fixture(scope="module")
def tracked(chain, tmp_path_factory):
    """A chain whose autoencoder is stopped half way and resumed; the records of its parts."""
    folder = tmp_path_factory.mktemp("tracked")
    mine = Chain(folder / "runs" / "small", chain.shards, folder / "latents")
    home = chain.runs.parents[1]
    train = mine.arguments("autoencoder", *TRACKED)
    in_a_process("fit", [*train, *signalled(4, "backward", signal.SIGUSR1)], home, code=75)
    in_a_process("fit", train, home)
    in_a_process("encode", [*mine.encode(), *TRACKED], home)
    upstream = f"--model.latents.checkpoint={mine.runs / 'autoencoder'}"
    in_a_process("fit", mine.arguments("diffusion", upstream, *TRACKED), home)
    return mine, stored(mine.runs / "autoencoder"), stored(mine.latents), stored(mine.runs / "diffusion")


@pytest.mark.slow
def test_each_uses_the_very_version_that_the_one_before_published(tracked):
    _, (_, autoencoder), (latents,), (diffusion,) = tracked
    (first,), (second,), (third,) = (part.of("artifact") for part in (autoencoder, latents, diffusion))
    assert [a["name"] for a in (first, second, third)] == [
        *("small-autoencoder", "tracked0-latents", "small-diffusion")
    ]
    assert [a["type"] for a in (first, second, third)] == ["autoencoder", "latents", "diffusion"]
    assert autoencoder.merged("config")["built_on"] == {}
    used = latents.merged("config")["built_on"]
    assert used.keys() == {first["name"]} and used[first["name"]] in first["aliases"]
    used = diffusion.merged("config")["built_on"]
    assert used.keys() == {first["name"], second["name"], "demo-clip"}
    assert used[first["name"]] in first["aliases"] and used[second["name"]] in second["aliases"]


@pytest.mark.slow
def test_a_resumed_run_is_one_run_and_is_published_at_its_end(tracked):
    _, (stopped, resumed), _, _ = tracked
    assert stopped.of("run")[0]["run_id"] == resumed.of("run")[0]["run_id"]
    assert not stopped.of("artifact") and len(resumed.of("artifact")) == 1
    rows = [row for part in (stopped, resumed) for row in part.history() if "train/loss" in row]
    assert [row["samples"] for row in rows] == [8 * i for i in range(1, 9)]


@pytest.mark.slow
def test_wandb_sync_finds_the_first_run_and_the_resumed_one(tracked):
    mine, *_ = tracked
    folders = sorted(map(str, (mine.runs / "autoencoder" / "wandb").glob("offline-run-*")))
    sync = [sys.executable, "-m", "wandb", "sync", "--dry-run", *folders]
    result = subprocess.run(sync, check=True, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert "Would sync 2 run(s)" in output and all(folder in output for folder in folders)


@pytest.mark.slow
def test_all_parts_are_in_the_group_of_their_chain_each_with_its_job_type(tracked):
    _, *parts = tracked
    runs = [part[-1].of("run")[0] for part in parts]
    assert [run["run_group"] for run in runs] == ["small"] * 3
    assert [run["job_type"] for run in runs] == ["autoencoder", "encode", "diffusion"]


@pytest.mark.slow
def test_images_and_noise_levels_are_logged_over_samples(tracked):
    *_, (diffusion,) = tracked
    for panel in ("images", "noise-levels"):
        shown = [row for row in diffusion.history() if f"{panel}.path" in row]
        assert [row["samples"] for row in shown] == [32, 64]
    assert {"val/fid/clip", "val/clip_score/clip"} <= diffusion.merged("config")["records"].keys()


@pytest.mark.slow
def test_checkpoints_are_copied_and_shards_are_named(tracked):
    mine, (_, autoencoder), (latents,), _ = tracked
    (artifact,) = autoencoder.of("artifact")
    contents = {entry["path"]: entry for entry in artifact["manifest"]["contents"]}
    assert {"last.ckpt", "config.yaml", "environment.json"} <= contents.keys()
    copied = Path(contents["last.ckpt"]["local_path"])
    assert copied.read_bytes() == (mine.runs / "autoencoder" / "checkpoints" / "last.ckpt").read_bytes()
    assert (mine.runs / "autoencoder" / "wandb") in copied.parents
    (artifact,) = latents.of("artifact")
    references = {e["path"]: e["ref"] for e in artifact["manifest"]["contents"] if "ref" in e}
    assert references == {path.name: path.as_uri() for path in mine.latents.glob("*.tar")}


class Listener(WandbSamplesLogger):
    """Keeps the calls."""

    def __init__(self, error=None):
        self.error, self.used, self.published = error, {}, []

    def use(self, versions, role):
        self.used[role] = versions

    def publish(self, artifact):
        if self.error:
            raise self.error
        self.published.append(artifact)


def test_an_artifact_that_cannot_be_published_is_a_warning(chain, tmp_path):
    """Neither a full disk nor a server ends what trained well."""
    full = Listener(OSError(28, "No space left on device"))
    with pytest.warns(UserWarning, match="autoencoder are not published: .*No space left on device"):
        publish_run([full], RunFolder(chain.runs / "autoencoder"), "autoencoder", {})
    made_by = json.loads((chain.latents / MANIFEST).read_text())
    with pytest.warns(UserWarning, match="shapes-latents are not published: .*No space left on device"):
        publish_latents(full, chain.latents, made_by)
    with pytest.warns(UserWarning, match="not published: .*does not exist"):
        publish_run([Listener()], RunFolder(tmp_path), "autoencoder", {})


def test_the_best_and_the_last_are_published_once(chain, tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.write_text("the last")
    best = last.with_name("best.ckpt")

    def published():
        publish_run([listener := Listener()], RunFolder(tmp_path), "autoencoder", {})
        return listener.published[0]

    best.write_text("the best")
    version = {path: f"sha-{sha256(path)[:16]}" for path in (last, best)}
    assert published().versions == [version[last], version[best], "best"]
    assert published().files == {"last.ckpt": last, "best.ckpt": best}
    best.unlink()
    best.hardlink_to(last)
    assert published().versions == [version[last], "best"] and published().files == {"last.ckpt": last}


def test_weights_to_start_with_are_named(chain, fresh, monkeypatch):
    listener = Listener()
    monkeypatch.setattr(lineage, "_loggers", lambda trainer: [listener])
    weights = chain.runs / "autoencoder"
    more = [f"--weights={weights}", "--trainer.max_steps=2", "--wandb.artifacts=true"]
    assert fit.main(fresh.arguments("autoencoder", *more)) == 0
    assert listener.used == {
        "built_on": {},
        "started_with": {"demo-autoencoder": f"sha-{Checkpoint.open(weights).sha256[:16]}"},
    }
    assert [artifact.name for artifact in listener.published] == ["runs-autoencoder"]


def test_nothing_is_published_by_default(chain, fresh):
    def recorded(*more):
        callbacks = training.build(fresh.arguments("autoencoder", *more)).trainer.callbacks
        return [callback for callback in callbacks if isinstance(callback, lineage.Lineage)]

    assert not recorded("--wandb.mode=offline")
    assert recorded(*TRACKED)
    assert not (chain.latents / "wandb").exists()


@pytest.mark.parametrize("path", ["runs/demo/clip", "runs/demo/clip/checkpoints/best.ckpt"])
def test_a_checkpoint_belongs_to_its_run(path):
    assert artifact_name(run_of(path).folder) == "demo-clip" and run_of(path).chain == "demo"


def test_names_are_such_that_the_client_takes_them():
    assert artifact_name(Path("runs/my chain/a+b")) == "my-chain-a-b"
