"""Files and messages of ldm.fit."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from tiny_runs import ROOT

from ldm import fit, training
from ldm.io.checkpoint import Checkpoint
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.clip import CLIP
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

STAGES = {"autoencoder": Autoencoder, "clip": CLIP, "diffusion": Diffusion}


@pytest.mark.parametrize("name", STAGES)
def test_a_run_leaves_one_folder(chain, name):
    run = chain.runs / name
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 8
    assert config["model"] == Checkpoint.open(run).state["config"]
    environment = json.loads((run / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert set(environment["git"]) == {"revision", "dirty"}
    assert os.uname().nodename not in (run / "environment.json").read_text()
    assert (run / "metrics.csv").is_file()
    grids = {"autoencoder": ["autoencoder"], "clip": [], "diffusion": ["diffusion", "noise-levels"]}
    images = [path.name for path in sorted((run / "images").glob("*.png"))]
    assert images == [f"{grid}-{n:010d}.png" for grid in grids[name] for n in (32, 64)]


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_alone_rebuilds_the_stage_with_averaged_weights(chain, name):
    saved = Checkpoint.open(chain.runs / name).state
    assert saved["weights"] == "ema"
    stage = load_stage(str(chain.runs / name), STAGES[name])
    assert stage.progress.samples == 64
    assert stage.image_size == 32
    for key, value in stage.state_dict().items():
        assert torch.equal(value, saved["state_dict"][key]), key


def test_the_configuration_of_a_run_is_a_configuration(chain, tmp_path):
    cli = training.build(["--config", str(chain.runs / "diffusion" / "config.yaml"), f"--run={tmp_path}"])
    assert cli.model.config == Checkpoint.open(chain.runs / "diffusion").state["config"]


@pytest.mark.slow
def test_a_run_trains_at_the_noise_levels_of_edm(fresh):
    """The objective by class names: the run learns and draws, and its checkpoint records the objective."""
    edm = {
        "schedule": "ldm.diffusion.VarianceExploding",
        "prediction": "ldm.diffusion.prediction.EDM",
        "prediction.sigma_data": "1",
        "timesteps": "ldm.diffusion.timesteps.LogNormal",
        "timesteps.mean": "-0.5",
    }
    more = [f"--model.objective.{key}={value}" for key, value in edm.items()]
    more.append("--model.sampler.spacing=ldm.diffusion.samplers.spacing.Karras")
    assert fit.main(fresh.arguments("diffusion", *more)) == 0
    run = fresh.runs / "diffusion"
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    # F of zero output has a loss of 1, the variance of its target
    assert len(losses) == 8 and all(0 < loss < 2 for loss in losses)
    stage = load_stage(str(run), Diffusion)
    assert stage.objective.prediction.sigma_data == 1.0 and stage.objective.timesteps.mean == -0.5
    assert len(list((run / "images").glob("diffusion-*.png"))) == 2


@pytest.mark.slow
def test_a_fresh_run_starts_with_given_weights(chain, fresh, capsys):
    weights = f"--weights={chain.runs / 'diffusion'}"
    frozen = ["--model.optimizer.lr=0", "--model.optimizer.weight_decay=0"]
    assert fit.main(fresh.arguments("diffusion", weights, *frozen)) == 0
    out = capsys.readouterr().out
    assert f"starts with {chain.runs / 'diffusion'}" in out
    assert re.search(r"captions: \d+ tokens at the median, \d+ at most, of 60; 0\.0% are cut to the 20", out)
    given, left = (
        Checkpoint.open(runs / "diffusion").state["state_dict"] for runs in (chain.runs, fresh.runs)
    )
    # averaging equal numbers rounds
    assert all(torch.allclose(given[key], left[key], rtol=1e-6, atol=1e-9) for key in given)


@pytest.mark.slow
def test_a_resumed_run_does_not_start_with_the_given_weights_again(chain, fresh, capsys):
    assert fit.main(fresh.arguments("clip")) == 0
    more = ["--trainer.max_steps=12", f"--weights={chain.runs / 'nowhere'}"]
    capsys.readouterr()
    assert fit.main(fresh.arguments("clip", *more)) == 0
    out, err = capsys.readouterr()
    assert "resumes" in out and "nowhere is not used" in err
    assert yaml.safe_load((fresh.runs / "clip" / "config.yaml").read_text())["weights"] is None


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ("clip", [], "is of stage 'clip', expected stage 'autoencoder'"),
        ("nowhere", [], "nowhere' does not exist"),
        ("autoencoder", ["--model.net.latent_channels=5"], "does not fit model of the configuration"),
    ],
)
def test_weights_that_do_not_fit_are_refused(chain, fresh, capsys, given, more, message):
    arguments = fresh.arguments("autoencoder", f"--weights={chain.runs / given}", *more)
    assert fit.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (fresh.runs / "autoencoder" / "checkpoints").exists()


def test_a_finished_run_reports_it_and_changes_nothing(chain, capsys):
    before = {p: p.stat().st_mtime_ns for p in (chain.runs / "clip").rglob("*")}
    assert fit.main(chain.arguments("clip")) == 0
    assert capsys.readouterr().out.startswith(f"{chain.runs / 'clip'}: finished, 8 of 8 steps are done")
    assert before == {p: p.stat().st_mtime_ns for p in (chain.runs / "clip").rglob("*")}


def test_a_finished_run_that_is_called_with_other_settings_says_which_and_is_an_error(chain, capsys):
    before = {p: p.stat().st_mtime_ns for p in (chain.runs / "clip").rglob("*")}
    assert fit.main(chain.arguments("clip", "--model.optimizer.lr=0.25")) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --run 'clip' is finished, and was trained with other settings")
    assert "model.optimizer.lr: 0.005, now 0.25)" in line
    of_the_machine = ["--data.num_workers=1", "--trainer.devices=1", "--trainer.max_steps=7"]
    assert fit.main(chain.arguments("clip", *of_the_machine, "--wandb.project=other")) == 0
    assert "finished, 8 of 7 steps are done" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (chain.runs / "clip").rglob("*")}


@pytest.mark.slow
def test_earlier_configurations_are_kept_if_they_differ(fresh):
    run = fresh.runs / "clip"
    for steps in (1, 2, 3):
        change = [f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1"]
        assert fit.main(fresh.arguments("clip", *change)) == 0
    steps = [
        yaml.safe_load((run / name).read_text())["trainer"]["max_steps"]
        for name in ("config-1.yaml", "config-2.yaml", "config.yaml")
    ]
    assert steps == [1, 2, 3]


@pytest.mark.slow
def test_best_and_kept_checkpoints_are_complete(fresh):
    more = [
        "--checkpoints.monitor=val/sampled_psnr",
        "--checkpoints.mode=max",
        "--checkpoints.keep_every_n_steps=4",
        "--checkpoints.keep_newest=2",
        "--trainer.max_steps=12",
    ]
    assert fit.main(fresh.arguments("autoencoder", *more)) == 0
    folder = fresh.runs / "autoencoder" / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {
        *("last.ckpt", "previous.ckpt", "best.ckpt"),
        *(f"step={n:08d}.ckpt" for n in (8, 12)),
    }
    assert Checkpoint.open(folder / "step=00000008.ckpt").state["global_step"] == 8
    assert Checkpoint.open(folder / "best.ckpt").state["global_step"] == 12
    assert Checkpoint.open(folder / "previous.ckpt").state["global_step"] == 8


def test_starting_afresh_in_a_used_folder_is_refused(chain, capsys):
    assert fit.main(chain.arguments("clip", "--ckpt_path=null")) == 2
    assert "already has last.ckpt: delete the folder, name another" in capsys.readouterr().err


def test_no_logger_is_fine(fresh):
    quick = ["--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    assert fit.main(fresh.arguments("autoencoder", "--trainer.logger=false", *quick)) == 0
    assert not (fresh.runs / "autoencoder" / "metrics.csv").exists()


@pytest.mark.slow
def test_wandb_offline_stays_in_the_run_folder(fresh, tmp_path):
    """In a process of its own: W&B writes its file when the process ends."""
    command = fresh.arguments("autoencoder", "--wandb.mode=offline")
    home = tmp_path / "home"
    home.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "ldm.fit", *command],
        env={**os.environ, "HOME": str(home), "WANDB_API_KEY": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    run = fresh.runs / "autoencoder"
    identity = (run / "wandb-id.txt").read_text().split("\n")[0]
    (record,) = (run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    content = record.read_bytes()
    for word in (b"autoencoder", b"runs", b"val/sampled_psnr", b"block_out_channels"):
        assert word in content
    assert len(list(record.parent.glob("files/media/images/images_*.png"))) == 2
    for name in ("config.yaml", "environment.json"):
        assert (record.parent / "files" / name).read_text() == (run / name).read_text()
    assert not [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in path.parts]
