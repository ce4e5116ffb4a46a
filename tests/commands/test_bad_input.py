"""Bad input ends in one clear line that names the file or key, what was found, what was expected."""

import json
import subprocess
import sys

import pytest
import torch
from comparing import error_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_runs import ROOT

from ldm import fit, sample
from ldm.cli import Reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "--data.train=nowhere/x-{000000..000003}.tar",
            "data.train: 4 of 4 shards are missing, the first is",
        ),
        ("--data.train=nowhere/*.tar", "data.train"),
        ("--data.train=[]", "data.train"),
        ("--data.val=nowhere.tar", "nowhere.tar"),
        ("--data.batch_size=1000", "data.batch_size: 1000 is more than the 60 samples of data.train"),
        ("--data.batch_size=many", "data.batch_size: got many, expected int"),
        ("--data.batch_size=0", "data.batch_size: got 0, expected at least 1"),
        ("--data.batch_sise=8", "--data.batch_sise"),
        ("--data.batch_siz=8", "--data.batch_siz"),
        ("--data.image_size=30", "30"),
        ("--data.fields=[image,latent]", "latent"),
        (
            "--model.optimizer.lrr=1",
            "model.optimizer: got the unknown key 'lrr', did you mean lr?, expected of Muon: lr, ",
        ),
        ("--model.net.norm_groups=eight", "model.net.norm_groups: got eight, expected int"),
        ("--model.net.norm_groups=7", "net.norm_groups=7 does not divide"),
        ("--model.class_path=ldm.stages.Nothing", "has no attribute 'Nothing'"),
        ("--wandb.mode=on", "wandb.mode: got on, expected one of 'offline', 'online', 'disabled'"),
        ("--wandb.mode=online", "wandb.mode: W&B cannot start"),
        ("--config=nowhere.yaml", "--config: 'nowhere.yaml' does not exist, expected a file, or a name"),
        ("--ckpt_path=nowhere.ckpt", "checkpoint 'nowhere.ckpt' does not exist"),
        ("--trainer.accelerator=abacus", "abacus"),
        ("--trainer.max_steps=-5", "max_steps"),
        ("--trainer.max_steps=-1", "trainer.max_steps: got none, expected how many optimizer steps"),
        ("--trainer.max_epochs=1", "trainer.max_epochs: got 1, expected trainer.max_steps"),
        ("--trainer.val_check_interval=00:00:00:20", "trainer.val_check_interval: got 00:00:00:20"),
    ],
)
def test_ldm_fit(fresh, capsys, monkeypatch, change, message):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(fresh.runs))
    assert message in error_of(capsys, fresh.arguments("autoencoder", change))
    assert not (fresh.runs / "autoencoder" / "checkpoints").exists()


def test_patches_that_do_not_tile_the_latent_are_refused_before_a_run_begins(fresh, capsys):
    transformer = {"patch_size": 3, "hidden": 32, "depth": 1, "heads": 2}
    chosen = json.dumps({"class_path": "DiT", "init_args": transformer})
    line = error_of(capsys, fresh.arguments("diffusion", f"--model.denoiser={chosen}"))
    assert "data.image_size: some images are 32x32, expected multiples of 12: of the latent space's 4" in line
    assert not (fresh.runs / "diffusion" / "checkpoints").exists()


def test_misspelt_key_in_a_file(fresh, capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  batch_sise: 8\n")
    assert "batch_sise" in error_of(capsys, fresh.arguments("autoencoder", f"--config={path}"))
    path.write_text("data: ][\n")
    assert "line 1" in error_of(capsys, fresh.arguments("autoencoder", f"--config={path}"))


def test_missing_upstream_checkpoint(fresh, capsys):
    line = error_of(capsys, fresh.arguments("diffusion", "--model.latents.checkpoint=runs/nothing"))
    assert "checkpoint 'runs/nothing' does not exist: expected a .ckpt file or the folder of a run" in line


def test_upstream_checkpoint_of_the_wrong_stage(chain, fresh, capsys):
    wrong = chain.runs / "clip"
    line = error_of(capsys, fresh.arguments("diffusion", f"--model.latents.checkpoint={wrong}"))
    assert "is of stage 'clip', expected stage 'autoencoder'" in line


def test_resuming_from_the_wrong_stage(chain, fresh, capsys):
    wrong = chain.runs / "clip"
    line = error_of(capsys, fresh.arguments("autoencoder", f"--ckpt_path={wrong}", "--trainer.max_steps=9"))
    assert "stage 'clip'" in line


def test_resuming_another_architecture(chain, fresh, capsys):
    change = [f"--ckpt_path={chain.runs / 'autoencoder'}", "--trainer.max_steps=9"]
    line = error_of(
        capsys, fresh.arguments("autoencoder", *change, "--model.net.block_out_channels=[16,32,32]")
    )
    assert "size mismatch" in line
    assert len(line) < 400


def test_damaged_checkpoint_is_named_and_left_alone(fresh, capsys):
    path = fresh.runs / "autoencoder" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04 and then nothing")
    assert f"checkpoint '{path}' cannot be read" in error_of(capsys, fresh.arguments("autoencoder"))
    assert path.read_bytes() == b"PK\x03\x04 and then nothing"


def test_broken_shard(fresh, capsys, tmp_path):
    path = tmp_path / "broken.tar"
    path.write_bytes((fresh.shards / "train-000000.tar").read_bytes()[:5000])
    assert "broken.tar" in error_of(capsys, fresh.arguments("autoencoder", f"--data.train={path}"))


@pytest.mark.slow
def test_changed_upstream_is_refused(chain, fresh, capsys, tmp_path):
    upstream = tmp_path / "autoencoder.ckpt"
    upstream.write_bytes((chain.runs / "autoencoder/checkpoints/last.ckpt").read_bytes())
    mine = [f"--model.latents.checkpoint={upstream}", f"--data.train={fresh.shards}/train-000000.tar"]
    mine = fresh.arguments("diffusion", *mine, "--data.fields=[image,text]", "--trainer.val_check_interval=2")
    assert fit.main([*mine, "--trainer.max_steps=2"]) == 0
    saved = torch.load(upstream, weights_only=True)
    torch.save({**saved, "progress": {"steps": 1, "samples": 1}}, upstream)
    line = error_of(capsys, mine)  # the beginning of a long path may be left out
    assert "upstream checkpoint '" in line and f"{upstream.name}' changed since this run began" in line


def test_latents_of_another_autoencoder_are_refused(fresh, capsys):
    quick = ["--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    assert fit.main(fresh.arguments("autoencoder", *quick)) == 0
    other = fresh.runs / "autoencoder"
    line = error_of(capsys, fresh.arguments("diffusion", f"--model.latents.checkpoint={other}"))
    assert "were encoded by another autoencoder" in line
    assert "runs/autoencoder" in line and "clip" not in line.replace(str(fresh.runs), "")
    assert line.endswith("delete the folder, or name another --out, and run ldm.encode again")


@pytest.mark.slow
def test_a_process_ends_with_one_line_and_code_2(fresh):
    command = [sys.executable, "-m", "ldm.fit", *fresh.arguments("autoencoder", "--data.val=nowhere.tar")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "nowhere.tar" in result.stderr


def test_tracebacks_on_request(fresh, monkeypatch):
    monkeypatch.setenv("LDM_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        fit.main(fresh.arguments("autoencoder", "--data.val=nowhere.tar"))


def test_a_device_that_is_not_here(capsys, chain):
    arguments = [f"--checkpoint={chain.runs / 'diffusion'}", "--prompt", "a", "--device=nonsense"]
    assert "--device: got nonsense, expected a device that is here" in error_of(
        capsys, arguments, sample.main
    )


def test_an_error_of_lightning_is_the_user_s():
    assert Reason.of(MisconfigurationException("no such accelerator")).is_of_input()
    assert not Reason.of(TypeError("a bug")).is_of_input()
