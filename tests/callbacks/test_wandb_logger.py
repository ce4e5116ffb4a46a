"""The real client, offline: what it has stored when its process ends."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ldm.callbacks.wandb_logger import SamplesWandb

RUN = """
import sys
from pathlib import Path
from ldm.callbacks.wandb_logger import Artifact, SamplesWandb

folder = Path(sys.argv[1])
settings = {"project": "test", "save_dir": str(folder), "offline": True, "id": "abc12345", "group": "g"}
log = SamplesWandb({"val/fid*": "min", "val/psnr": "max"}, settings)
for i, value in enumerate((5.0, 3.0, 4.0), 1):
    step = {"samples": 10 * i, "train/loss": value}
    log.log_metrics({**step, "val/fid/clip": value, "val/psnr": -value}, step=i)
log.keep_files([folder / "notes.txt"])
(folder / "notes.txt").unlink()
log.use("upstream", "sha")
says = {"samples": 30, "upstream": {}}
log.publish(Artifact("g-stage", "stage", "sha-1", [folder / "last.ckpt"], [folder / "a.tar"], says))
(folder / "last.ckpt").write_text("replaced")
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folder of the run, its records by type, and its summary."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("notes.txt", "last.ckpt", "a.tar"):
        (folder / name).write_text(f"this is {name}")
    quiet = {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "HOME": str(folder / "home")}
    quiet |= {name: str(folder / "staging") for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")}
    subprocess.run([sys.executable, "-c", RUN, str(folder)], check=True, env=os.environ | quiet)
    (run,) = folder.glob("wandb/offline-run-*-abc12345")
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    lines = subprocess.run(
        [*leet, str(run)], check=True, env=os.environ | quiet, capture_output=True, text=True
    )
    records = [json.loads(line) for line in lines.stdout.splitlines()]
    return folder, run, records


def of_kind(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


@pytest.mark.slow
def test_the_best_value_is_kept_beside_the_last(stored):
    _, _, records = stored
    summary = {}
    for update in of_kind(records, "summary"):
        summary |= update["update"]
    assert summary["val/fid/clip"] == {"min": 3, "last": 4}
    assert summary["val/psnr"] == {"max": -3, "last": -4}
    assert summary["train/loss"] == 4


@pytest.mark.slow
def test_every_metric_is_over_samples(stored):
    _, _, records = stored
    metrics = of_kind(records, "metric")
    axes = {metric.get("step_metric") for metric in metrics if metric.get("name") != "samples"}
    assert axes == {"samples"}
    # of several patterns that match W&B takes any: there must be one, and names
    assert [metric["glob_name"] for metric in metrics if "glob_name" in metric] == ["*"]
    assert {metric["name"] for metric in metrics if "name" in metric} == {
        "samples",
        "val/fid/clip",
        "val/psnr",
    }


@pytest.mark.slow
def test_files_are_copies(stored):
    folder, run, records = stored
    assert not (folder / "notes.txt").exists()
    copied = run / "files" / "notes.txt"
    assert copied.read_text() == "this is notes.txt" and not copied.is_symlink()
    paths = [file["path"] for record in of_kind(records, "files") for file in record["files"]]
    assert "notes.txt" in paths


@pytest.mark.slow
def test_an_artifact_holds_the_checkpoint_as_it_was_and_names_shards(stored):
    folder, _, records = stored
    (artifact,) = of_kind(records, "artifact")
    assert artifact["name"] == "g-stage" and set(artifact["aliases"]) == {"latest", "sha-1"}
    assert json.loads(artifact["metadata"]) == {"samples": 30, "upstream": {}}
    contents = {entry["path"]: entry for entry in artifact["manifest"]["contents"]}
    assert set(contents) == {"last.ckpt", "a.tar"}
    assert contents["a.tar"]["ref"] == (folder / "a.tar").as_uri()
    staged = Path(contents["last.ckpt"]["local_path"])
    assert staged.read_text() == "this is last.ckpt" and (folder / "staging") in staged.parents


class Server:
    """Stands for the client's run, online."""

    def __init__(self, knows):
        self.knows, self.used = knows, []

    def use_artifact(self, name):
        if name not in self.knows:
            raise ValueError(f"artifact {name} not found")
        self.used.append(name)


def test_lineage_needs_a_known_artifact_and_training_goes_on_without(tmp_path):
    log = SamplesWandb({}, {"project": "test", "save_dir": str(tmp_path)})
    log._experiment = Server({"demo-autoencoder:sha-1"})
    log.use("demo-autoencoder", "sha-1")
    assert log.experiment.used == ["demo-autoencoder:sha-1"]
    with pytest.warns(UserWarning, match="no lineage from demo-clip:sha-2"):
        log.use("demo-clip", "sha-2")
    offline = SamplesWandb({}, {"project": "test", "save_dir": str(tmp_path), "offline": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offline.use("demo-clip", "sha-2")
    assert offline._experiment is None
