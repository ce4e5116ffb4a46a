"""On a GPU the commands compute what they compute on a CPU, in every precision; runs move between the two."""

import csv
import io
import json
import math
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny_runs import ROOT

from ldm import evaluate, fit, sample

pytestmark = pytest.mark.gpu
STAGES = ["autoencoder", "clip", "diffusion"]
GPU, DEVICE = ["--trainer.accelerator=gpu", "--trainer.devices=1"], "cuda"


def command(environment, module, *arguments):
    line = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(run):
    with (run / "metrics.csv").open(newline="") as file:
        return {
            int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]
        }


@pytest.mark.parametrize("stage", STAGES)
def test_training_computes_what_it_does_on_a_cpu(on_gpu, chain, fresh, stage):
    command(on_gpu, "ldm.fit", *fresh.arguments(stage, *GPU))
    found, expected = losses(fresh.runs / stage), losses(chain.runs / stage)
    assert len(found) == 8
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found == pytest.approx(expected, rel=1e-2)  # rounding grows from step to step


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_on_the_other_device(on_gpu, chain, fresh, stage):
    half = ["--checkpoints.keep_every_n_steps=4", f"--run={fresh.runs / 'half'}"]
    assert fit.main(fresh.arguments(stage, *half)) == 0
    start = f"--ckpt_path={fresh.runs / 'half/checkpoints/step=00000004.ckpt'}"
    command(on_gpu, "ldm.fit", *fresh.arguments(stage, *GPU, start))
    found, expected = losses(fresh.runs / stage), losses(chain.runs / stage)
    assert list(found) == [4, 5, 6, 7]
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-2)
    back = f"--ckpt_path={fresh.runs / stage}"
    more = ["--trainer.max_steps=9", f"--run={fresh.runs / 'back'}"]
    assert fit.main(fresh.arguments(stage, back, *more)) == 0
    assert list(losses(fresh.runs / "back")) == [8]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_trains_and_resumes(on_gpu, chain, fresh, stage, precision):
    arguments = [*GPU, f"--trainer.precision={precision}"]
    command(on_gpu, "ldm.fit", *fresh.arguments(stage, *arguments, "--trainer.max_steps=4"))
    command(on_gpu, "ldm.fit", *fresh.arguments(stage, *arguments))
    found, expected = losses(fresh.runs / stage), losses(chain.runs / stage)
    assert len(found) == 8 and all(map(math.isfinite, found.values()))
    assert found[0] == pytest.approx(expected[0], rel=0.05)


def test_split_weights_on_a_gpu(on_gpu, chain, fresh):
    command(on_gpu, "ldm.fit", *fresh.arguments("diffusion", *GPU, "--trainer.strategy=fsdp2"))
    found, expected = losses(fresh.runs / "diffusion"), losses(chain.runs / "diffusion")
    assert found == pytest.approx(expected, rel=1e-2)


def test_two_gpus_compute_what_one_does(on_gpu, num_gpus, chain, fresh):
    if num_gpus < 2:
        pytest.skip("needs two GPUs")
    for stage in STAGES:
        two = ["--trainer.accelerator=gpu", "--trainer.devices=2", "--data.batch_size=4"]
        command(on_gpu, "ldm.fit", *fresh.arguments(stage, *two, "--trainer.strategy=ddp"))
        assert losses(fresh.runs / stage) == pytest.approx(losses(chain.runs / stage), rel=1e-2)


def test_the_same_images_are_drawn(on_gpu, chain, tmp_path):
    drawn = {}
    arguments = ["--checkpoint", chain.runs / "diffusion", "--prompt", "a red ring", "--num-per-prompt", 4]
    command(on_gpu, "ldm.sample", *arguments, f"--out={tmp_path / 'gpu'}", f"--device={DEVICE}")
    assert sample.main([*map(str, arguments), f"--out={tmp_path / 'cpu'}", "--device=cpu"]) == 0
    for name in ("gpu", "cpu"):
        paths = sorted((tmp_path / name).glob("0*.png"))
        drawn[name] = np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])
    assert drawn["gpu"].shape == (4, 32, 32, 3)
    assert np.abs(drawn["gpu"] - drawn["cpu"]).max() <= 2


def test_the_same_numbers_are_measured(on_gpu, chain, tmp_path):
    arguments = [
        *("--checkpoint", chain.runs / "diffusion", f"--data={chain.shards / 'val-000000.tar'}"),
        *(f"--clip={chain.runs / 'clip'}", "--steps=2"),
    ]
    command(on_gpu, "ldm.evaluate", *arguments, f"--out={tmp_path / 'gpu'}", f"--device={DEVICE}")
    assert evaluate.main([*map(str, arguments), f"--out={tmp_path / 'cpu'}", "--device=cpu"]) == 0
    gpu, cpu = (
        {value["name"]: value["value"] for value in json.loads(path.read_text())["results"][0]["values"]}
        for path in (tmp_path / "gpu/evaluation.json", tmp_path / "cpu/evaluation.json")
    )
    assert gpu == pytest.approx(cpu, rel=1e-2, abs=1e-4)


def test_the_same_latents_are_encoded(on_gpu, chain, tmp_path):
    command(on_gpu, "ldm.encode", *chain.encode()[:2], f"--out={tmp_path}", f"--device={DEVICE}")
    paths = sorted(chain.latents.glob("*.tar"))
    assert paths
    for path in paths:
        ours, theirs = latents(path), latents(tmp_path / path.name)
        assert list(ours) == list(theirs)
        np.testing.assert_allclose(
            np.stack([*ours.values()]).astype(float), np.stack([*theirs.values()]), atol=1e-3
        )


def latents(shard):
    with tarfile.open(shard) as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".npy")}
    return {name: np.load(io.BytesIO(content)) for name, content in members.items()}
