"""An average of any length, made by a command of a run's snapshots, and used by the others."""

import json

import pytest
import torch

from ldm import convert, evaluate, fit, sample
from ldm.checkpointing.snapshots import read_averages
from ldm.io.checkpoint import Checkpoint

AVERAGES = ["--trainer.callbacks+=PostHocEMA", "--trainer.callbacks.every_n_steps=2"]


@pytest.fixture(scope="module")
def run(chain, home, tmp_path_factory):
    """A diffusion run of eight steps with four snapshots."""
    folder = tmp_path_factory.mktemp("post-hoc") / "diffusion"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert fit.main(chain.arguments("diffusion", *AVERAGES, f"--run={folder}")) == 0
    return folder


def make(run, *arguments):
    return convert.main(["post-hoc-ema", f"--run={run}", *map(str, arguments)])


@pytest.mark.slow
def test_any_length_is_made_and_used(run, tmp_path, capsys, chain):
    assert make(run, "--sigma-rel=0.07") == 0
    made = run / "checkpoints" / "sigma_rel=0.07.ckpt"
    assert f"wrote {made}" in (out := capsys.readouterr().out) and "of 4 snapshots, the last of step 8" in out
    before, after = Checkpoint.open(run), Checkpoint.open(made)
    assert after.progress == before.progress and after.upstream == before.upstream
    assert after.weights == "average with sigma_rel 0.07"
    assert before.state["state_dict"].keys() == after.state["state_dict"].keys()
    assert make(run, "--sigma-rel=0.07", f"--out={tmp_path / 'made'}") == 0  # a run folder, to be moved
    same = Checkpoint.open(tmp_path / "made").state["state_dict"]
    assert all(torch.equal(value, same[name]) for name, value in after.state["state_dict"].items())
    assert any((tmp_path / "made" / "upstream").iterdir())
    out = tmp_path / "images"
    assert sample.main([f"--checkpoint={made}", "--prompt=a red ring", "--steps=2", f"--out={out}"]) == 0
    data, clip = f"--data={chain.shards}/val-000000.tar", f"--clip={chain.runs / 'clip'}"
    measured = [f"--checkpoint={made}", data, clip, "--num-images=2", "--steps=1", "--device=cpu"]
    assert evaluate.main([*measured, f"--out={tmp_path / 'measured'}"]) == 0
    (result,) = json.loads((tmp_path / "measured" / "evaluation.json").read_text())["results"]
    assert result["drawn"]["weights"] == "average with sigma_rel 0.07"
    exported = ["to-diffusers", f"--run={tmp_path / 'made'}", f"--out={tmp_path / 'exported'}"]
    assert convert.main(exported) == 0


@pytest.mark.slow
def test_a_length_that_was_tracked_is_returned(run, tmp_path):
    out = tmp_path / "tracked.ckpt"
    assert make(run, "--sigma-rel=0.1", "--step=6", f"--out={out}") == 0
    made = Checkpoint.open(out)
    stored = dict(read_averages(run / "averages" / "step=00000006.safetensors", 1))
    assert made.progress.steps == 6 and len(stored) > 20
    for name, value in stored.items():
        torch.testing.assert_close(made.state["state_dict"][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_what_cannot_be_made_is_one_clear_line(run, chain, capsys):
    def error(folder, *arguments):
        assert make(folder, *arguments) == 2
        return capsys.readouterr().err

    assert "expected a length in (0, 0.288]" in error(run, "--sigma-rel=0.4")
    assert "there is no snapshot of 5" in error(run, "--sigma-rel=0.1", "--step=5")
    assert "already" in error(run, "--sigma-rel=0.1", f"--out={run}")
    assert "has no snapshots in averages/" in error(chain.runs / "diffusion", "--sigma-rel=0.1")
    assert "is an autoencoder" in error(chain.runs / "autoencoder", "--sigma-rel=0.1")
