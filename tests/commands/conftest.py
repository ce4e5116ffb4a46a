"""Tiny shards, and a chain of tiny runs that the tests of the commands share."""

from pathlib import Path

import pytest
import torch
from tiny_runs import Chain

from data.shapes_packer import Settings, pack
from ldm import encode, fit


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shapes"
    pack(folder, Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
    return folder


@pytest.fixture(scope="session")
def chain(shards, tmp_path_factory) -> Chain:
    """Run folders of an autoencoder, a CLIP and a diffusion on it, each trained for eight steps."""
    chain = Chain(tmp_path_factory.mktemp("runs"), shards, shards.parent / "latents")
    assert fit.main(chain.arguments("autoencoder")) == 0
    assert fit.main(chain.arguments("clip")) == 0
    assert encode.main(chain.encode()) == 0
    assert fit.main(chain.arguments("diffusion")) == 0
    return chain


@pytest.fixture
def fresh(chain, tmp_path) -> Chain:
    """The same data and upstream runs, and a folder of one's own for further runs."""
    return Chain(tmp_path / "runs", chain.shards, chain.latents, upstream=chain.runs)
