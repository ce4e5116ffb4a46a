"""An autoencoder against a discriminator by lines of YAML: start, resumption, two processes, bad input."""

import json
import shutil

import pytest
import torch
from comparing import assert_same_run, error_of, metrics, state
from tiny_runs import Chain

from ldm import fit
from ldm.checkpointing.writer import AtomicCheckpointIO
from ldm.latents.space import AutoencoderLatents
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.load import load_stage

D = {"class_path": "PatchGAN", "init_args": {"channels": 8, "num_layers": 2, "norm_groups": 4}}
RECIPE = {"class_path": "AdamW", "init_args": {"lr": 1e-3, "warmup": 1, "decay": "none", "betas": [0.5, 0.9]}}


def adversarial(discriminator=D, **more):
    arguments = {"discriminator": discriminator, "optimizer": RECIPE, **more}
    losses = [{"class_path": "Adversarial", "init_args": arguments}]
    return f"--model.losses={json.dumps(losses)}"


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory):
    """A run of eight steps whose discriminator begins with the fourth."""
    runs = Chain(tmp_path_factory.mktemp("adversarial"), chain.shards, chain.latents)
    assert fit.main(runs.arguments("autoencoder", adversarial(start=24))) == 0
    return runs.runs / "autoencoder"


def test_the_game_begins_at_its_start_and_not_before(chain, trained):
    rows, plain = metrics(trained), metrics(chain.runs / "autoencoder")
    steps = [row for row in rows if row["train/loss"]]
    assert [bool(row["train/adversarial_weight"]) for row in steps] == [False] * 3 + [True] * 5
    for ours, theirs in zip(steps[:4], plain[:4], strict=True):
        assert ours["train/reconstruction"] == theirs["train/reconstruction"]
    assert all(float(row["train/adversarial_weight"]) > 0 for row in steps[3:])
    moments = state(trained)["optimizer_states"][0]["state"]
    assert {int(m["step"]) for m in moments.values() if "exp_avg" in m} == {5}


@pytest.mark.slow
@pytest.mark.parametrize(("step", "where"), [(2, "start"), (5, "backward")])
def test_a_run_with_a_discriminator_resumes_bit_for_bit(trained, fresh, step, where):
    stop = ["--trainer.callbacks+=interruptions.Stop", f"--trainer.callbacks.step={step}"]
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit.main(
            fresh.arguments("autoencoder", adversarial(start=24), *stop, f"--trainer.callbacks.where={where}")
        )
    assert fit.main(fresh.arguments("autoencoder", adversarial(start=24))) == 0
    assert_same_run(fresh.runs / "autoencoder", trained)


def test_the_discriminator_is_saved_but_neither_averaged_nor_read_by_later_stages(trained):
    saved = state(trained)
    judge = {name for name in saved["state_dict"] if name.startswith("terms.")}
    assert len(judge) == 2 + 3 * 2 + 2 and all(".discriminator.main." in name for name in judge)
    assert not any(name.startswith("terms.") for name in saved["callbacks"]["EMA"]["raw"])
    assert AutoencoderLatents(str(trained)).channels == 4


def test_latents_are_described_at_each_validation(trained):
    row = next(row for row in metrics(trained)[::-1] if row["val/latent_std_min"])
    values = [float(row[f"val/latent_{name}"]) for name in ("std_min", "std_max", "kurtosis_max", "mean_max")]
    assert 0 < values[0] <= values[1] and values[2] > 1 and values[3] >= 0
    assert float(row["val/dead_channels"]) in (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            adversarial(start=64),
            "model.losses: adversarial starts after 64 samples, but the run ends after 64",
        ),
        (
            adversarial({"class_path": "PatchGAN", "init_args": {"num_layers": 4}}),
            "discriminator.num_layers: got 4, too deep for images of 32 pixels, expected at most 3",
        ),
        (
            "--model.frozen=[encoder, decoder]",
            "model.frozen: got encoder and decoder, expected one of them: nothing is left to train",
        ),
        ("--data.image_size=30", "the autoencoder needs sizes divisible by 4, got 30x30"),
        (
            '--model.losses=[{"class_path": "LPIPS", "init_args": {"weights": "nowhere.pth"}}]',
            "LPIPS needs torchvision's vgg16-397923af.pth, but the file 'nowhere.pth' does not exist",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(fresh, capsys, losses, message):
    assert message in error_of(capsys, fresh.arguments("autoencoder", losses))


@pytest.mark.slow
def test_features_of_a_clip_run_judge_images_by_lines_of_yaml(chain, fresh, tmp_path, capsys):
    clip = shutil.copytree(chain.runs / "clip", tmp_path / "clip")
    tower = {"class_path": "CLIPTower", "init_args": {"checkpoint": str(clip)}}
    block = "model.visual.transformer.resblocks.0"
    width = state(chain.runs / "clip")["config"]["init_args"]["net"]["init_args"]["vision_cfg"]["width"]
    judge = {
        "class_path": "FeatureDiscriminator",
        "init_args": {"extractor": tower, "layers": {block: width}},
    }
    losses = [
        {
            "class_path": "FeatureDistance",
            "init_args": {"extractor": tower, "layers": [block], "weight": 0.1},
        },
        {"class_path": "Adversarial", "init_args": {"discriminator": judge}},
    ]
    nll = {"class_path": "LearnedVariance", "init_args": {"terms": [{"class_path": "L1"}]}}
    more = [f"--model.losses={json.dumps(losses)}", f"--model.reconstruction={json.dumps(nll)}"]
    more.append("--model.frozen=[encoder]")
    assert fit.main(fresh.arguments("autoencoder", *more, "--trainer.max_steps=2")) == 0
    saved = state(fresh.runs / "autoencoder")
    judges = [name for name in saved["state_dict"] if name.startswith("terms.3.")]
    assert judges and all(name.startswith("terms.3.discriminator.heads.") for name in judges)
    assert float(metrics(fresh.runs / "autoencoder")[0]["train/features"]) > 0
    assert load_stage(str(fresh.runs / "autoencoder"), Autoencoder).terms[0].log_scale.shape == (1,)
    names = {"features", "adversarial.discriminator"}
    assert saved["frozen_networks"].keys() == names and len({*saved["frozen_networks"].values()}) == 1
    weights = torch.load(clip / "checkpoints" / "last.ckpt", weights_only=True)
    weights["state_dict"]["net.model.visual.proj"] += 1
    AtomicCheckpointIO().save_checkpoint(weights, clip / "checkpoints" / "last.ckpt")
    line = error_of(capsys, fresh.arguments("autoencoder", *more, "--trainer.max_steps=4"), fit.main)
    assert "model.losses: the weights of 'features' are others than when this run began" in line
