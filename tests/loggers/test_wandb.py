"""The real client, offline: what it has stored when its process ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_records import Records

from ldm.loggers.directions import no_directions
from ldm.loggers.outbox import Outbox
from ldm.loggers.wandb import WandbSamplesLogger

RUN = """
import sys
from pathlib import Path
from ldm.loggers.outbox import Artifact
from ldm.loggers.wandb import WandbSamplesLogger

folder = Path(sys.argv[1])
settings = {"project": "test", "save_dir": str(folder), "offline": True, "id": "abc12345", "group": "g"}
log = WandbSamplesLogger(lambda: {"val/fid/clip": "min", "val/psnr": "max"}, settings)
for i, value in enumerate((5.0, 3.0, 4.0), 1):
    step = {"samples": 10 * i, "train/loss": value}
    log.log_metrics({**step, "val/fid/clip": value, "val/psnr": -value}, step=i)
log.keep_files([folder / "notes.txt"])
(folder / "notes.txt").unlink()
log.use({"g-autoencoder": "sha-0"}, "built_on")
try:
    log.experiment.use_artifact("g-autoencoder:sha-0")
except TypeError as refusal:
    (folder / "refusal.txt").write_text(str(refusal))
says = {"samples": 30, "upstream": {}}
files = {"last.ckpt": folder / "last.ckpt"}
log.publish(Artifact("g-stage", "stage", ["sha-1"], files, [folder / "a.tar"], says))
(folder / "last.ckpt").write_text("replaced")
launcher = (name for name in sys.modules if name.startswith("wandb.sdk.launch."))
(folder / "launcher.txt").write_text(" ".join(launcher))
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folder of the run, that of the client's, and the client's records."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("notes.txt", "last.ckpt", "a.tar"):
        (folder / name).write_text(f"this is {name}")
    quiet = {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "HOME": str(folder / "home")}
    quiet |= {name: str(folder / "staging") for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")}
    subprocess.run([sys.executable, "-c", RUN, str(folder)], check=True, env=os.environ | quiet)
    (run,) = folder.glob("wandb/offline-run-*-abc12345")
    return folder, run, Records(run)


@pytest.mark.slow
def test_the_summary_has_the_best_value_and_the_last(stored):
    _, _, records = stored
    summary = records.merged("summary")
    assert summary["val/fid/clip"] == {"min": 3, "last": 4}
    assert summary["val/psnr"] == {"max": -3, "last": -4}
    assert summary["train/loss"] == 4


@pytest.mark.slow
def test_its_launcher_is_not_imported(stored):
    """It takes two seconds; of it the client's start asks one module, which finds nothing to do."""
    folder, _, _ = stored
    imported = (folder / "launcher.txt").read_text().split()
    assert "wandb.sdk.launch.inputs.internal" in imported
    assert not {"wandb.sdk.launch._launch", "wandb.sdk.launch.agent"} & set(imported)


@pytest.mark.slow
def test_every_metric_is_over_samples(stored):
    _, _, records = stored
    metrics = records.of("metric")
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
    paths = [file["path"] for record in records.of("files") for file in record["files"]]
    assert "notes.txt" in paths


@pytest.mark.slow
def test_an_artifact_holds_the_checkpoint_as_it_was_and_names_shards(stored):
    folder, _, records = stored
    (artifact,) = records.of("artifact")
    assert artifact["name"] == "g-stage" and set(artifact["aliases"]) == {"latest", "sha-1"}
    assert json.loads(artifact["metadata"]) == {"samples": 30, "upstream": {}}
    contents = {entry["path"]: entry for entry in artifact["manifest"]["contents"]}
    assert set(contents) == {"last.ckpt", "a.tar"}
    assert contents["a.tar"]["ref"] == (folder / "a.tar").as_uri()
    staged = Path(contents["last.ckpt"]["local_path"])
    assert staged.read_text() == "this is last.ckpt" and (folder / "staging") in staged.parents


@pytest.mark.slow
def test_offline_the_config_lists_used_artifacts(stored):
    _, _, records = stored
    assert records.merged("config")["built_on"] == {"g-autoencoder": "sha-0"}


@pytest.mark.slow
def test_the_client_refuses_to_draw_lineage_offline_so_it_is_noted_for_later(stored):
    """Once it no longer does, ``use`` should ask it offline too."""
    folder, _, _ = stored
    assert (folder / "refusal.txt").read_text() == "Cannot use artifact when in offline mode."
    entries = [json.loads(line) for line in (folder / "wandb" / "outbox.jsonl").read_text().splitlines()]
    assert [entry.get("use") for entry in entries] == [{"g-autoencoder": "sha-0"}, None]


class Config(dict):
    """Stands for the config of the client's run."""

    def update(self, values, allow_val_change):
        super().update(values)


class Server:
    """Stands for the client's run, online."""

    def __init__(self, knows, folder):
        self.knows, self.used, self.config = knows, [], Config()
        self.dir = str(folder / "wandb" / "run-1-abc12345" / "files")

    def use_artifact(self, name):
        if name not in self.knows:
            raise ValueError(f"artifact {name} not found")
        self.used.append(name)


def test_lineage_needs_a_known_artifact_and_training_goes_on_without(tmp_path):
    log = WandbSamplesLogger(no_directions, {"project": "test", "save_dir": str(tmp_path)})
    log._experiment = Server({"demo-autoencoder:sha-1"}, tmp_path)
    with pytest.warns(UserWarning, match="no lineage from demo-clip:sha-2"):
        log.use({"demo-clip": "sha-2", "demo-autoencoder": "sha-1"}, "built_on")
    assert log.experiment.used == ["demo-autoencoder:sha-1"]
    assert log.experiment.config == {"built_on": {"demo-clip": "sha-2", "demo-autoencoder": "sha-1"}}
    (noted,) = Outbox(tmp_path / "wandb").entries()
    assert noted["use"] == log.experiment.config["built_on"]


def test_offline_no_artifact_is_requested(tmp_path):
    log = WandbSamplesLogger(no_directions, {"project": "test", "save_dir": str(tmp_path), "offline": True})
    log._experiment = Server({"demo-clip:sha-2"}, tmp_path)
    log.use({"demo-clip": "sha-2"}, "built_on")
    assert not log.experiment.used and log.experiment.config == {"built_on": {"demo-clip": "sha-2"}}
