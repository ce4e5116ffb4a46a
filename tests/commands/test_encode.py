"""ldm.encode: latents that equal encoding in training, restartable, and true to their autoencoder."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from comparing import error_of
from PIL import Image
from tiny_runs import ROOT

from ldm import encode, fit
from ldm.compiler import InferenceCompiler
from ldm.data.module import Shards
from ldm.io.images import from_bytes
from ldm.latents import encode as encoding
from ldm.latents.manifest import note_shard
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.load import load_stage


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_latents_are_the_posterior_of_the_same_images(chain):
    data = Shards(
        [str(chain.latents / "train-{000000..000002}.tar")],
        [str(chain.shards / "train-{000000..000002}.tar")],
        image_size=32,
        batch_size=60,
        fields=["latent", "text"],
    )
    latents = next(iter(data.train_dataloader()))
    images = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    order = [latents["key"].index(key) for key in images["key"]]
    with torch.no_grad():
        posterior = load_stage(str(chain.runs / "autoencoder"), Autoencoder).net.encode(images["image"])
    expected = torch.cat([posterior.mean, posterior.std], 1)
    torch.testing.assert_close(latents["latent"][order].float(), expected, rtol=1e-3, atol=1e-4)


def test_everything_but_the_image_is_kept_as_it_is(chain):
    before, after = (members(folder / "train-000001.tar") for folder in (chain.shards, chain.latents))
    assert {n for n in after if not n.endswith(".latent.npy")} == {
        n for n in before if not n.endswith(".png")
    }
    assert all(before[name] == content for name, content in after.items() if name in before)


def test_an_interrupted_call_is_repeated_where_it_stopped(chain, tmp_path, capsys):
    command = [*chain.encode()[:-1], f"--out={tmp_path}"]
    (tmp_path / ".train-000001.tar.tmp-1").write_text("cut short")
    assert encode.main(command) == 0
    first = (tmp_path / "train-000000.tar").stat().st_mtime_ns
    (tmp_path / "train-000002.tar").unlink()
    assert encode.main(command) == 0
    assert "60 samples" in capsys.readouterr().out
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == first
    for name in ("train-000000.tar", "train-000002.tar"):
        assert (tmp_path / name).read_bytes() == (chain.latents / name).read_bytes()


def test_compiled_blocks_encode_the_same(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(InferenceCompiler, "backend", "eager")  # torch's own kernels: no bit may differ
    for choice in ("off", "on"):
        command = [
            *chain.encode()[:-1],
            f"--out={tmp_path / choice}",
            f"--compile={choice}",
            "--batch-size=16",
        ]
        assert encode.main(command) == 0
    assert capsys.readouterr().err.count("--compile: the first batch takes a minute") == 1
    for name in ("train-000000.tar", "train-000002.tar"):
        assert (tmp_path / "on" / name).read_bytes() == (tmp_path / "off" / name).read_bytes()


def test_finished_work_of_a_killed_call_is_kept(chain, tmp_path, monkeypatch):
    command = [*chain.encode()[:-1], f"--out={tmp_path}"]
    monkeypatch.setattr(encoding, "note_shard", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        encode.encode(command)
    monkeypatch.undo()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(done) == 2 and json.loads((tmp_path / "latents.json").read_text())["shards"] == {}
    encode.encode(command)
    assert done.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}.items()
    assert files(tmp_path) == files(chain.latents)


def stop_after(count):
    """Note so many shards, then be killed."""

    def noting(*arguments, noted=[]):  # noqa: B006  (counts)
        note_shard(*arguments)
        noted.append(arguments)
        if len(noted) == count:
            raise KeyboardInterrupt

    return noting


def is_index(path):
    """Whether it is a sidecar of a shard."""
    return path.suffix == ".npz" or path.name.startswith(".shards-")


def files(folder):
    """Output of ldm.encode by file name, hidden files included, sidecars of shards excluded."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not is_index(path)}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_encode_what_one_does(chain, tmp_path, workers):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [*chain.encode()[:-1], f"--out={tmp_path}", "--batch-size=7", f"--num-workers={workers}"]
    result = subprocess.run(
        [*command, "-m", "ldm.encode", *options], capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("60 samples") == 1
    assert files(tmp_path).keys() == files(chain.latents).keys()
    assert files(tmp_path)["latents.json"] == files(chain.latents)["latents.json"]
    for name in ("train-000000.tar", "train-000001.tar", "train-000002.tar"):
        ours, theirs = members(tmp_path / name), members(chain.latents / name)
        assert ours.keys() == theirs.keys()
        for member, content in theirs.items():
            if not member.endswith(".npy"):
                assert ours[member] == content
            else:  # in other batches, which are added up otherwise: float16's last digit
                np.testing.assert_allclose(array(ours[member]), array(content), rtol=2e-3, atol=1e-4)


def array(member):
    return np.load(io.BytesIO(member))


def test_bad_images_are_left_out_and_reported(chain, tmp_path, capsys):
    broken = bytearray((chain.shards / "train-000000.tar").read_bytes())
    start = broken.index(b"\x89PNG")
    broken[start : start + 8] = b"notapng!"
    (tmp_path / "broken.tar").write_bytes(broken)
    command = [chain.encode()[0], f"--shards={tmp_path / 'broken.tar'}", f"--out={tmp_path / 'out'}"]
    assert encode.main([*command, "--keep-images"]) == 0
    output = capsys.readouterr()
    assert "19 samples, 1 bad ones skipped" in output.out
    assert "broken.tar: sample 'shapes-train-0000000000', member 'png'" in output.err
    manifest = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert len(manifest["shards"]["broken.tar"]["skipped"]) == 1
    assert sum(name.endswith(".png") for name in members(tmp_path / "out" / "broken.tar")) == 19


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--shards=nowhere-{000..003}.tar", "--shards: 4 of 4 shards are missing"),
        ("--size=34", "--size: got 34, expected a multiple of the autoencoder's factor 4"),
        ("--size=16", "was encoded with image_size 32, expected 16"),
        ("--autoencoder=nowhere", "checkpoint 'nowhere' does not exist"),
        ("--batch-size=0", "--batch-size: got 0, expected a number >0"),
    ],
)
def test_bad_input(chain, capsys, change, message):
    before = {path: path.read_bytes() for path in chain.latents.iterdir() if path.is_file()}
    assert message in error_of(capsys, [*chain.encode(), change], encode.main)
    assert before == {path: path.read_bytes() for path in chain.latents.iterdir() if path.is_file()}


def test_without_a_key_it_ends_before_anything_is_encoded(chain, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    out = tmp_path / "latents"
    command = [*chain.encode(), f"--out={out}", "--wandb.artifacts=true", "--wandb.mode=online"]
    assert "wandb.mode: W&B cannot start" in error_of(capsys, command, encode.main)
    assert not list(out.glob("*.tar")) and not (out / "latents.json").exists()


def test_a_bad_image_ends_encoding_where_the_policy_says_so(chain, tmp_path, capsys):
    found = members(chain.shards / "train-000000.tar")
    broken = next(name for name in found if name.endswith(".png"))
    with tarfile.open(tmp_path / "train-000000.tar", "w") as file:
        for name, content in found.items():
            info = tarfile.TarInfo(name)
            info.size = len(content := content[:40] if name == broken else content)
            file.addfile(info, io.BytesIO(content))
    out = tmp_path / "out"
    command = [*chain.encode(), f"--shards={tmp_path / 'train-000000.tar'}", f"--out={out}"]
    assert encode.main([*command, "--bad-samples.action=error"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: --bad-samples.action is error: " in line and "its 40 bytes are no JPEG" in line
    assert not list(out.glob("*.tar"))
    assert encode.main(command) == 0
    assert json.loads((out / "latents.json").read_text())["shards"]["train-000000.tar"]["samples"] == 19


@pytest.mark.slow
def test_latents_of_another_autoencoder_are_not_mixed(chain, fresh, capsys):
    assert error_of(capsys, [*chain.encode(), f"--autoencoder={chain.runs / 'clip'}"], encode.main)
    assert fit.main(fresh.arguments("autoencoder", "--trainer.max_steps=4")) == 0
    other = f"--autoencoder={fresh.runs / 'autoencoder'}"
    line = error_of(capsys, [*chain.encode(), other], encode.main)
    assert "holds latents of another autoencoder" in line


def test_flipped_latents_are_those_of_the_flipped_images(chain, tmp_path, capsys):
    command = [
        *chain.encode(),
        f"--out={tmp_path / 'flipped'}",
        f"--shards={chain.shards / 'train-000000.tar'}",
    ]
    assert encode.main([*command, "--flip", "--keep-images"]) == 0
    assert "flip True, expected False" in error_of(capsys, [*command, "--keep-images"], encode.main)
    found = members(tmp_path / "flipped" / "train-000000.tar")
    key = next(name for name in found if name.endswith(".png")).removesuffix(".png")
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(found[f"{key}.png"])))).permute(2, 0, 1)[None]
    net = load_stage(str(chain.runs / "autoencoder"), Autoencoder).net
    for name, image in (("latent", pixels), ("latent.flip", pixels.flip(-1))):
        with torch.no_grad():
            posterior = net.encode(from_bytes(image))
        expected = torch.cat([posterior.mean, posterior.std], 1)[0].numpy()
        np.testing.assert_allclose(array(found[f"{key}.{name}.npy"]), expected, rtol=2e-3, atol=1e-3)


def test_a_filter_encodes_what_it_keeps_and_names_what_no_sample_has(chain, tmp_path, capsys):
    command = [*chain.encode()[:-1], f"--out={tmp_path / 'out'}"]
    assert encode.main([*command, "--filter=aesthetic > 5"]) == 2
    assert "error: --filter: no sample has 'aesthetic': the first has" in capsys.readouterr().err
    named = [pair for n in range(3) for pair in members(chain.shards / f"train-{n:06d}.tar").items()]
    lengths = sorted(len(text.decode().strip()) for name, text in named if name.endswith(".txt"))
    limit = lengths[len(lengths) // 2]
    assert encode.main([*command, f"--filter=caption_length < {limit}"]) == 0
    found = [name for shard in (tmp_path / "out").glob("*.tar") for name in members(shard)]
    assert 0 < sum(n.endswith("latent.npy") for n in found) == sum(length < limit for length in lengths)
