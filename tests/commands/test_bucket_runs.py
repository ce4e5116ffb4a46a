"""Runs on images of all shapes: all stages, from images and from latents, resumed with other workers."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from comparing import assert_same_run, error_of, state
from one_after_another import fit_all
from PIL import Image
from tiny_runs import Chain
from tiny_shards import write_tar

from ldm import encode, fit, sample
from ldm.data.decode import SampleId
from ldm.data.fields import decode_sample
from ldm.data.view import View
from ldm.io.images import from_bytes
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.load import load_stage

SHAPES = [(48, 48), (32, 64), (64, 40), (40, 90)]
BUCKETS = ["--data.buckets.multiple=8", "--data.image_size=32"]


@pytest.fixture(scope="module")
def shaped(chain, tmp_path_factory) -> Chain:
    """Three shards of 20 noisy images of four shapes, in place of the demo's shapes."""
    folder = tmp_path_factory.mktemp("shaped")
    generator = torch.Generator().manual_seed(0)
    for shard in range(3):
        files = []
        for number in range(20 * shard, 20 * shard + 20):
            height, width = SHAPES[(number * 7) % 4]
            pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(out, "PNG")
            files += [(f"{number:04d}.png", out.getvalue()), (f"{number:04d}.txt", b"a red ring")]
        write_tar(folder / "shards" / f"train-{shard:06d}.tar", files)
        write_tar(folder / "shards" / f"val-{shard:06d}.tar", files)
    return Chain(folder / "runs", folder / "shards", folder / "latents")


@pytest.fixture(scope="module")
def autoencoder(shaped, home):
    """An autoencoder that was trained on all shapes."""
    assert fit.main(shaped.arguments("autoencoder", *BUCKETS)) == 0
    return shaped.runs / "autoencoder"


def test_a_run_on_all_shapes_resumes_bit_for_bit_with_other_workers(shaped, autoencoder, tmp_path):
    again = Chain(tmp_path, shaped.shards, shaped.latents)
    stop = ["--trainer.callbacks+=interruptions.Stop", "--trainer.callbacks.step=5"]
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit.main(again.arguments("autoencoder", *BUCKETS, *stop, "--trainer.callbacks.where=start"))
    assert fit.main(again.arguments("autoencoder", *BUCKETS, "--data.num_workers=1")) == 0
    assert_same_run(tmp_path / "autoencoder", autoencoder)
    found = state(autoencoder)
    assert found["image_size"] == 32
    assert found["Shards"]["data"]["buckets"] == "40x24 32x32 24x40"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_as_one_with_the_same_global_batch(shaped, home, tmp_path):
    exact = ["--model.optimizer.class_path=exact.SGD", "--model.optimizer.lr=0.1", "--ema.decay=0"]
    exact += ["--model.optimizer.warmup=1", *BUCKETS]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
    both = Chain(tmp_path / "two", shaped.shards, shaped.latents).arguments("autoencoder", *exact, *two)
    fit_all([{"arguments": both}], tmp_path / "plan.json", home)
    assert (
        fit.main(Chain(tmp_path / "one", shaped.shards, shaped.latents).arguments("autoencoder", *exact)) == 0
    )
    ours, theirs = (state(tmp_path / name / "autoencoder") for name in ("one", "two"))
    assert ours["Shards"] == theirs["Shards"]
    for name, weight in ours["state_dict"].items():
        torch.testing.assert_close(theirs["state_dict"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def encoded(shaped, autoencoder):
    """The command line that encoded all shapes."""
    shards = shaped.shards / "train-{000000..000002}.tar"
    command = [f"--autoencoder={autoencoder}", f"--shards={shards}", f"--out={shaped.latents}"]
    assert encode.main([*command, "--buckets.multiple=8", "--batch-size=6"]) == 0
    return command


def latent_shapes(path):
    with tarfile.open(path) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar}
    keys = [name.removesuffix(".latent.npy") for name in found if name.endswith(".latent.npy")]
    arrays = {key: np.load(io.BytesIO(found[f"{key}.latent.npy"])) for key in keys}
    return arrays, {key: json.loads(found[f"{key}.json"]) for key in keys}


def test_latents_have_the_shapes_of_their_images(shaped, autoencoder, encoded):
    manifest = json.loads((shaped.latents / "latents.json").read_text())
    assert manifest["buckets"] == [[24, 40], [32, 32], [40, 24]]
    assert manifest["shards"]["train-000000.tar"]["buckets"] == {"40x24": 10, "32x32": 5, "24x40": 5}
    net = load_stage(str(autoencoder), Autoencoder).net
    size_of = {(48, 48): (32, 32), (32, 64): (24, 40), (64, 40): (40, 24), (40, 90): (24, 40)}
    arrays, metas = latent_shapes(shaped.latents / "train-000001.tar")
    assert len(arrays) == 20
    for key, array in arrays.items():
        stored = SHAPES[(int(key) * 7) % 4]
        height, width = size_of[stored]
        assert array.shape == (8, height // 4, width // 4)
        assert (metas[key]["height"], metas[key]["width"]) == stored
    key = next(key for key in arrays if SHAPES[(int(key) * 7) % 4] == (40, 90))
    with tarfile.open(shaped.shards / "train-000001.tar") as tar:
        members = {"png": tar.extractfile(f"{key}.png").read()}
    image = decode_sample(members, SampleId("", key), ["image"], View(24, 40))["image"]
    with torch.no_grad():
        posterior = net.encode(from_bytes(image[None]))
    expected = torch.cat([posterior.mean, posterior.std], 1)[0]
    torch.testing.assert_close(torch.from_numpy(arrays[key]).float(), expected, rtol=2e-3, atol=1e-3)


def test_encoding_again_the_same_way_does_nothing_and_another_way_is_refused(shaped, encoded, capsys):
    before = {path: path.stat().st_mtime_ns for path in shaped.latents.glob("*.tar")}
    assert encode.main([*encoded, "--buckets.multiple=8"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in shaped.latents.glob("*.tar")}
    assert "was encoded with buckets" in error_of(capsys, encoded, encode.main)
    line = error_of(capsys, [*encoded, "--buckets.multiple=6"], encode.main)
    assert "expected a multiple of the autoencoder's factor 4" in line


def diffusion(shaped, autoencoder, runs, *more):
    conditioner = json.dumps({"class_path": "ImageSize", "init_args": {"width": 16}})
    more = [f"--model.latents.checkpoint={autoencoder}", f"--model.conditioner={conditioner}", *more]
    return Chain(runs, shaped.shards, shaped.latents).arguments("diffusion", *more)


@pytest.mark.slow
def test_diffusion_trains_on_latents_of_all_shapes_without_images(shaped, autoencoder, encoded, tmp_path):
    """The sizes come from the latents; the original ones, which condition, from what ldm.encode noted."""
    assert fit.main(diffusion(shaped, autoencoder, tmp_path)) == 0
    data = state(tmp_path / "diffusion")["Shards"]["data"]
    assert data["buckets"] == "40x24 32x32 24x40"
    assert data["data.batch_size x processes"] == 8
    assert data["samples"] == 60
    run = [f"--checkpoint={tmp_path / 'diffusion'}", "--device=cpu", "--steps=2", "--num=2"]
    assert sample.main([*run, f"--out={tmp_path / 'out'}", "--height=40", "--width=24"]) == 0
    with Image.open(tmp_path / "out" / "000001.png") as image:
        assert image.size == (24, 40)


@pytest.mark.slow
def test_latents_in_other_buckets_are_refused(shaped, autoencoder, encoded, tmp_path, capsys):
    other = diffusion(shaped, autoencoder, tmp_path, "--data.buckets.multiple=16")
    assert "the latents of data.train are of 40x24 32x32 24x40, expected" in error_of(capsys, other)
    val = diffusion(shaped, autoencoder, tmp_path, f"--data.val={shaped.latents / 'train-000000.tar'}")
    assert "was encoded in buckets, but validation takes squares" in error_of(capsys, val)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("autoencoder", ["--data.buckets.multiple=6"], "the autoencoder needs sizes divisible by 4, got "),
        ("clip", [], "data.buckets: got 40x24 32x32 24x40, but CLIP's image tower takes squares of one size"),
        ("autoencoder", ["--data.reader=Streaming"], "data.buckets: Streaming does not know the sizes"),
        ("autoencoder", ["--data.buckets.max_ratio=0.5"], "buckets.max_ratio: got 0.5, expected at least 1"),
    ],
)
def test_what_does_not_fit_is_an_error_before_the_first_step(
    shaped, tmp_path, capsys, name, options, message
):
    run = Chain(tmp_path, shaped.shards, shaped.latents)
    assert message in error_of(capsys, run.arguments(name, *BUCKETS, *options))
    assert not (tmp_path / name / "checkpoints").exists()
