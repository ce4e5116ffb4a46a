"""Shards in an S3 store: a run on them is the run on a local copy."""

from __future__ import annotations

import json
import logging
import os
from itertools import islice

import boto3
import lightning as L
import pytest
import torch
from moto.server import ThreadedMotoServer
from tiny_shards import write_shards
from tiny_stage import TinyStage, trainer

from ldm.cli import run_command
from ldm.data import remote
from ldm.data.manifest import latents_size
from ldm.data.module import Indexed, Shards
from ldm.data.source import DataRank, SampleSpec
from ldm.data.tar import expand
from ldm.latents.encode import ShardEncoder, encode_shards
from ldm.nets.autoencoder import KLAutoencoder

SPEC = SampleSpec(("image", "text", "label"), 8, 5, {"label": 10})
COUNTS = [7, 5, 9, 4, 6]
TRAIN = "train-{000000..000004}.tar"


@pytest.fixture(scope="module")
def store():
    """A client of a server of S3 on this machine, which all programs find by their environment."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with pytest.MonkeyPatch.context() as environment:
        settings = {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port())}
        settings |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
        for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            environment.setenv(name, value)
        remote._made.cache_clear()
        yield boto3.client("s3")
        remote._made.cache_clear()
    server.stop()


@pytest.fixture
def bucket(store, tmp_path, monkeypatch):
    """Name of a bucket with the shards of ``tmp_path / "data"``."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path / "data", COUNTS)
    write_shards(tmp_path / "data", [6, 6], "val", 100)
    name = f"set-{os.urandom(4).hex()}"
    store.create_bucket(Bucket=name)
    for path in (tmp_path / "data").iterdir():
        store.upload_file(str(path), name, f"web/{path.name}")
    return name


def keys(source, start=0, num=10, workers=0):
    loader = source.loader(lambda: start, 6, workers, DataRank(0, 1))
    return [(batch["key"], batch["text"]) for batch in islice(loader, num)]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_identity_are_those_of_local_files(bucket, tmp_path, workers):
    local = Indexed(2, str(tmp_path / "local")).open(str(tmp_path / "data" / TRAIN), SPEC)
    found = Indexed(2, cache_gb=1e-3).open(f"s3://{bucket}/web/{TRAIN}", SPEC)
    found.check()
    assert found.identity() == local.identity()
    assert keys(found, 11, workers=workers) == keys(local, 11)


def test_globs_and_folders_are_listed(bucket, monkeypatch):
    expected = [f"s3://{bucket}/web/train-{n:06d}.tar" for n in range(5)]
    assert expand(f"s3://{bucket}/*/train-*.tar", "x") == expected
    single = {url: remote.version(url) for url in expected}
    monkeypatch.setattr(remote, "MANY", 1)
    assert remote.versions(expected) == single
    assert all(version.tag.startswith("etag:") for version in single.values())


def test_a_shard_written_anew_is_indexed_anew(bucket, store, tmp_path):
    url = f"s3://{bucket}/web/{TRAIN}"
    before = Indexed().files(url, "x").summaries
    changed = (tmp_path / "data" / "train-000002.tar").read_bytes().replace(b"number 12", b"number XX")
    store.put_object(Bucket=bucket, Key="web/train-000002.tar", Body=changed)
    files = Indexed().files(url, "x")
    same = [now.mtime_ns == then.mtime_ns for now, then in zip(files.summaries, before, strict=True)]
    assert same == [True, True, False, True, True]
    assert "number XX" in {files.members(2, n, ("txt",))[0]["txt"].decode().strip() for n in range(9)}


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("s3://{}/web/nothing.tar", 2, "web/nothing.tar: no such file in the store"),
        ("s3://no-bucket-{}/a.tar", 2, "a.tar: no such file in the store"),
        ("s3://{}/web", 2, "no such shard, but a folder"),
        ("s3://{}/web/nothing-*.tar", 2, "matches no file"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(bucket, capsys, url, code, message):
    assert run_command(lambda: print(Indexed().open(url.format(bucket), SPEC))) == code
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_latents_next_to_remote_shards_are_recognised(bucket, store):
    assert latents_size(f"s3://{bucket}/web/{TRAIN}", "data.train") is None
    about = {"autoencoder": {"sha256": "0", "checkpoint": "x"}, "image_size": 64, "shards": {}}
    store.put_object(Bucket=bucket, Key="web/latents.json", Body=json.dumps(about).encode())
    assert latents_size(f"s3://{bucket}/web/{TRAIN}", "data.train") == 64
    store.delete_object(Bucket=bucket, Key="web/latents.json")
    assert latents_size(f"s3://{bucket}/web/{TRAIN}", "data.train") is None


def test_encoded_shards_are_those_of_local_files(bucket, tmp_path):
    torch.manual_seed(0)
    net = KLAutoencoder(latent_channels=1, block_out_channels=[4], layers_per_block=1, norm_groups=2)
    encoder = ShardEncoder(net, torch.device("cpu"), 8, 4, 0, False)
    made_by = {"autoencoder": {"sha256": "0", "checkpoint": "x"}, "image_size": 8, "keep_images": False}
    for out, data in (("a", tmp_path / "data"), ("b", f"s3://{bucket}/web")):
        found = encode_shards(encoder, expand(f"{data}/{TRAIN}", "x"), tmp_path / out, made_by)
        assert found == (sum(COUNTS), 0)
    for path in (tmp_path / "a").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


class Exact(TinyStage):
    """Draws no random numbers."""

    def training_step(self, batch, batch_idx):
        return (self(batch["image"]) - batch["image"]).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


def train(folder, data, steps, resumed=None):
    """Train on the shards of ``data``; return the weights, the last checkpoint and the validation losses."""
    L.seed_everything(3, verbose=False)
    shards = Shards(f"{data}/{TRAIN}", f"{data}/val-*.tar", batch_size=4, image_size=8, reader=Indexed(2))
    stage, path = Exact(), folder / "last.ckpt"
    fit = trainer(folder, max_steps=steps)
    fit.fit(stage, shards, ckpt_path=resumed)
    fit.save_checkpoint(path)
    return [p.detach().clone() for p in (stage.scale, stage.shift)], path, fit.callback_metrics["val/loss"]


def test_training_is_that_on_local_files_and_either_resumes_the_other(bucket, tmp_path):
    local, store = str(tmp_path / "data"), f"s3://{bucket}/web"
    expected, _, loss = train(tmp_path / "a", local, 12)
    weights, _, found = train(tmp_path / "b", store, 12)
    assert all(map(torch.equal, weights, expected)) and torch.equal(loss, found)
    for name, first, then in (("c", local, store), ("d", store, local)):
        _, checkpoint, _ = train(tmp_path / name, first, 5)
        weights, _, found = train(tmp_path / name, then, 12, checkpoint)
        assert all(map(torch.equal, weights, expected)) and torch.equal(loss, found)
