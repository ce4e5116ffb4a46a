"""A chain of runs works wherever it lies: what a run was built on is found next to it, by its hash."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import assert_equal, error_of
from PIL import Image
from safetensors.torch import load_file

from ldm import convert, evaluate, fit, sample
from ldm.checkpointing.writer import AtomicCheckpointIO
from ldm.io.checkpoint import Checkpoint


def copied(chain, tmp_path, monkeypatch, *without):
    copy = tmp_path / "copy"
    shutil.copytree(chain.runs, copy, ignore=shutil.ignore_patterns("images", "wandb", *without))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return copy


@pytest.fixture
def copied_chain(chain, tmp_path, monkeypatch):
    """A copy of the chain, and a working directory where relative paths of its configs lead nowhere."""
    return copied(chain, tmp_path, monkeypatch)


@pytest.fixture
def elsewhere(chain, tmp_path, monkeypatch):
    """The same, of runs that have not kept what they were built on."""
    return copied(chain, tmp_path, monkeypatch, "upstream")


def command(run, *more):
    return [f"--checkpoint={run}", "--prompt=a red ring", "--steps=1", "--device=cpu", "--out=out", *more]


def train_further(run):
    """Replace a checkpoint as further training would."""
    last = run / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    weights = {name: weight + 1 for name, weight in state["state_dict"].items()}
    AtomicCheckpointIO().save_checkpoint({**state, "state_dict": weights}, last)


def kept(run):
    return sorted(path.name for path in (run / "upstream").iterdir())


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)).tolist() for path in folder.glob("*.png")}


def test_a_run_keeps_what_it_is_built_on_and_draws_the_same_whatever_becomes_of_it(copied_chain):
    run = copied_chain / "diffusion"
    assert kept(run) == sorted(f"{sha}.ckpt" for sha in Checkpoint.open(run).upstream.values())
    assert sample.main(command(run)) == 0
    before = pixels(Path("out"))
    assert len(before) > 0
    shutil.rmtree(copied_chain / "autoencoder")
    train_further(copied_chain / "clip")
    (copied_chain / "diffusion").rename(copied_chain.parent / "alone")
    assert sample.main(command(copied_chain.parent / "alone", "--out=again")) == 0
    assert pixels(Path("again")) == before


def test_a_kept_copy_is_a_hard_link_to_the_original(chain):
    for sha256 in kept(chain.runs / "diffusion"):
        assert (chain.runs / "diffusion" / "upstream" / sha256).stat().st_nlink > 1


@pytest.mark.slow
def test_a_run_exports_and_resumes_the_same_after_its_upstream_went_on(chain, copied_chain):
    run = copied_chain / "diffusion"
    assert convert.main(["to-diffusers", f"--run={run}", "--out=before"]) == 0
    train_further(copied_chain / "autoencoder")
    shutil.rmtree(copied_chain / "clip")
    assert convert.main(["to-diffusers", f"--run={run}", "--out=after"]) == 0
    files = sorted(path.relative_to("before") for path in Path("before").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert_equal(load_file(Path("before") / file), load_file(Path("after") / file), str(file))
    arguments = [a for a in chain.arguments("diffusion", "--trainer.max_steps=9") if "--run=" not in a]
    assert fit.main([*arguments, f"--run={run}"]) == 0
    assert kept(run) == kept(chain.runs / "diffusion")


def test_a_kept_file_that_was_damaged_is_passed_over(copied_chain):
    for file in (copied_chain / "diffusion" / "upstream").iterdir():
        file.write_bytes(b"")
    assert sample.main(command(copied_chain / "diffusion")) == 0


def test_a_copied_chain_is_used_from_any_working_directory(elsewhere):
    assert sample.main(command("../copy/diffusion")) == 0
    assert sample.main(command(elsewhere / "diffusion" / "checkpoints" / "last.ckpt")) == 0


@pytest.mark.slow
def test_a_copied_chain_is_exported_measured_and_resumed(chain, elsewhere, capsys):
    run = elsewhere / "diffusion"
    assert convert.main(["to-diffusers", f"--run={run}", "--out=pipeline"]) == 0
    data = [f"--data={chain.shards / 'val-000000.tar'}", f"--clip={elsewhere / 'clip'}", "--num-images=4"]
    assert evaluate.main([f"--checkpoint={run}", *data, "--steps=1", "--device=cpu"]) == 0
    arguments = [a for a in chain.arguments("diffusion", "--trainer.max_steps=9") if "--run=" not in a]
    assert fit.main([*arguments, f"--run={run}"]) == 0
    assert Checkpoint.open(run).upstream == Checkpoint.open(chain.runs / "diffusion").upstream


def test_the_option_names_another_path(elsewhere, capsys):
    for name, folder in (("autoencoder", "ae"), ("clip", "tower")):
        (elsewhere / name).rename(elsewhere / folder)
    line = error_of(capsys, command(elsewhere / "diffusion"), sample.main)
    assert "upstream checkpoint 'runs/demo/autoencoder' does not exist: looked for SHA-256" in line
    assert re.search(r"at '\S+copy/autoencoder'", line) and "--upstream autoencoder=PATH" in line
    option = ["--upstream", f"autoencoder={elsewhere / 'ae'}", f"clip={elsewhere / 'tower'}"]
    assert sample.main(command(elsewhere / "diffusion", *option)) == 0


def test_a_changed_neighbour_is_passed_over_for_the_recorded_file(
    chain, elsewhere, home, monkeypatch, capsys
):
    train_further(elsewhere / "autoencoder")
    line = error_of(capsys, command(elsewhere / "diffusion"), sample.main)
    assert "upstream checkpoint 'runs/demo/autoencoder' changed since this run began (SHA-256" in line
    assert re.search(r"now at '\S+copy/autoencoder'", line)  # the beginning of a long path is left out
    changed = f"autoencoder={elsewhere / 'autoencoder'}"
    line = error_of(capsys, command(elsewhere / "diffusion", "--upstream", changed), sample.main)
    assert "--upstream autoencoder: '" in line and "that of the checkpoint" in line
    original = f"autoencoder={chain.runs / 'autoencoder'}"
    assert sample.main(command(elsewhere / "diffusion", "--upstream", original)) == 0
    monkeypatch.chdir(home)  # where the path as it is written leads to the recorded file
    assert sample.main(command(elsewhere / "diffusion", f"--out={elsewhere / 'out'}")) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("autoencoder", "--upstream: got 'autoencoder', expected NAME=PATH"),
        ("vae=x", "--upstream: nothing here is built on a checkpoint named 'vae'"),
        ("clip=nowhere", "checkpoint 'nowhere' does not exist"),
    ],
)
def test_bad_options(chain, home, monkeypatch, capsys, option, message):
    run = chain.runs / "diffusion"
    assert message in error_of(capsys, command(run, "--upstream", option), sample.main)


def test_a_checkpoint_of_version_0_1(elsewhere, capsys):
    last = elsewhere / "diffusion" / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    torch.save({k: v for k, v in state.items() if k not in ("ldm_version", "format")}, last)
    line = error_of(capsys, command(elsewhere / "diffusion"), sample.main)
    assert "was written by ldm 0.1" in line and "train it again, or export it with ldm.convert" in line
