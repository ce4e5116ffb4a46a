"""Each of configs/conditions in miniature: it trains, resumes, draws, and obeys its condition."""

import csv
import io
import tarfile

import pytest
import torch
from PIL import Image
from tiny_runs import ROOT, Chain
from torchvision.transforms.functional import pil_to_tensor

from data.shapes.packer import Settings, pack
from data.writing import write_shards
from ldm import encode, fit, sample
from ldm.data.fields import FIELDS
from ldm.data.module import Shards
from ldm.io.images import to_bytes
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

pytestmark = pytest.mark.slow

CONFIGS = sorted((ROOT / "configs" / "conditions").glob("[!_]*.yaml"))
METRICS = {
    "inpainting": {"val/known/psnr", "val/caption/all"},
    "layout": {"val/layout/all"},
    "semantic": {"val/map/objects"},
    "super-resolution": {"val/psnr", "val/caption/all"},
    "composite": {"val/known/psnr", "val/caption/all"},
}


@pytest.fixture(scope="module")
def conditioned(chain, home) -> Chain:
    """Shards with every field to condition on: images and their latents."""
    shards, latents = home / "shards" / "conditions", home / "shards" / "conditions-latents"
    pack(shards, Settings(train=24, val=12, novel=0, pairs=0, shard_size=12, conditions=True))
    made = Chain(home / "runs" / "conditions", shards, latents)
    arguments = [f"--autoencoder={chain.runs / 'autoencoder'}", f"--shards={shards / 'train-*.tar'}"]
    assert encode.main([*arguments, f"--out={latents}", "--keep-images"]) == 0
    return made


def arguments(chain, name, **more):
    settings = {
        "run": chain.runs / name,
        "wandb.mode": "disabled",
        "data.train": chain.latents / "train-{000000..000001}.tar",
        "data.val": chain.shards / "val-000000.tar",
        "data.batch_size": 6,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "model.sampler.num_steps": 2,
        "model.denoiser.block_out_channels": "[32,64]",
        "sample_grid.num": 4,
        **more,
    }
    config = ROOT / "configs" / "conditions" / f"{name}.yaml"
    return ["--config", str(config), *(f"--{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_condition_trains_resumes_and_draws(conditioned, name):
    assert fit.main(arguments(conditioned, name, **{"trainer.max_steps": 2})) == 0
    assert fit.main(arguments(conditioned, name)) == 0
    run = conditioned.runs / name
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert all(any(row.get(metric) for row in rows) for metric in METRICS[name])
    assert [path.name for path in sorted((run / "images").glob("*.png"))] == [
        f"{kind}-{seen:010d}.png" for kind in ("diffusion", "noise-levels") for seen in (12, 24)
    ]
    stage = load_stage(str(run), Diffusion)
    assert stage.progress.samples == 24
    assert not [key for key in stage.state_dict() if "latents" in key or "text." in key]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_drawn_images_depend_on_the_condition(conditioned, name):
    stage = load_stage(str(conditioned.runs / name), Diffusion)
    shards = str(conditioned.shards / "val-000000.tar")
    data = Shards(shards, shards, image_size=32, batch_size=4)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    stage.conditioner.check(batch)
    drawn = stage.generate(batch, seed=0)
    assert torch.equal(drawn, stage.generate(batch, seed=0))
    others = {
        field: batch[field][::-1] if isinstance(batch[field], list) else batch[field].flip(0)
        for field in batch
    }
    other = stage.generate({**others, "key": batch["key"]}, seed=0)
    assert (drawn - other).abs().mean() > 1e-4


@pytest.mark.parametrize("name", sorted(METRICS))
def test_the_command_draws_from_files_as_from_a_batch(conditioned, tmp_path, name):
    shard = conditioned.shards / "val-000000.tar"
    run, data = str(conditioned.runs / name), Shards(str(shard), str(shard), image_size=32, batch_size=1)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    with tarfile.open(shard) as tar:
        tar.extractall(tmp_path, filter="data")
    key, reads = batch["key"][0], load_stage(run, Diffusion).conditioner.reads
    members = {"image": "png"} | {field: FIELDS[field].members[0] for field in FIELDS if field != "image"}
    given = [f"{FIELDS[f].option}={tmp_path / key}.{members[f]}" for f in reads if FIELDS[f].help]
    given += [f"--prompt={batch['text'][0]}"] if "text" in reads else []
    command = [f"--checkpoint={run}", "--device=cpu"]
    assert sample.main([*command, f"--out={tmp_path / 'files'}", *given]) == 0
    found = Image.open(tmp_path / "files" / "000000.png")
    named = batch["text"][0] if "text" in reads else "image"
    expected = to_bytes(load_stage(run, Diffusion).generate({**batch, "key": [f"{named}/0"]}, seed=0))[0]
    assert (pil_to_tensor(found).int() - expected.int()).abs().max() <= 1
    assert sample.main([*command, f"--out={tmp_path / 'shards'}", f"--shards={shard}", "--num=2"]) == 0
    assert (tmp_path / "shards" / "000001.png").is_file()


def test_a_condition_that_is_not_given_is_named(conditioned, tmp_path, capsys):
    command = [f"--checkpoint={conditioned.runs / 'composite'}", f"--out={tmp_path}", "--prompt=a red ring"]
    assert sample.main(command) == 2
    assert (
        "got --prompt or --prompts, expected --prompt or --prompts and --image and --mask"
        in capsys.readouterr().err
    )


def test_every_configuration_is_tried():
    assert [path.stem for path in CONFIGS] == sorted(METRICS)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "semantic",
            {"model.conditioner.num_classes": 5},
            "is no class of the model, expected 0 to 4 (conditioner.num_classes=5)",
        ),
        (
            "layout",
            {"model.conditioner.num_classes": 3},
            "is no class of the model, expected 0 to 2 (conditioner.num_classes=3)",
        ),
        (
            "super-resolution",
            {"model.conditioner.scale": 8, "data.fields": "[image,low_res]"},
            "expected 4 at",
        ),
        ("inpainting", {"data.fields": "[latent,mask]"}, "the batch has no image: add it to data.fields"),
    ],
)
def test_bad_conditions_end_in_one_line(conditioned, capsys, tmp_path, name, more, message):
    assert fit.main(arguments(conditioned, name, **more, run=tmp_path)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line


def test_labels_that_the_model_lacks_end_in_one_line_before_the_first_step(capsys, tmp_path):
    samples = [{"__key__": f"{n}", "png": png(n), "cls": str(n)} for n in range(4)]
    (shard,) = write_shards(samples, tmp_path / "shards", "train", 4)
    settings = {
        "run": tmp_path / "run",
        "wandb.mode": "disabled",
        "data.train": shard,
        "data.val": shard,
        "data.batch_size": 4,
        "model.conditioner.num_classes": 2,
        "trainer.accelerator": "cpu",
    }
    config = ROOT / "configs" / "demo" / "digits.yaml"
    assert fit.main(["--config", str(config), *(f"--{key}={value}" for key, value in settings.items())]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "data.train: 2 of the first 4 samples have classes that the model lacks" in line
    assert "is no class of the model, expected 0 to 1 (conditioner.num_classes=2)" in line


def png(shade):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()
