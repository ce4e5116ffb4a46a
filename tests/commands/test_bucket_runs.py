"""Runs on images of all shapes: all stages, from images and from latents, resumed with other workers."""

import io

import pytest
import torch
from comparing import assert_same_run, error_of, state
from PIL import Image
from tiny_runs import Chain
from tiny_shards import write_tar

from ldm import fit

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
