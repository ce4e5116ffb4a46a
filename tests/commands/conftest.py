"""Tiny shards, and a chain of tiny runs that the tests of the commands share."""

import contextlib
from pathlib import Path

import pytest
from tiny_runs import Chain

from data.shapes_packer import Settings, pack
from ldm import encode, fit


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Stands for the root of the repository, where commands are run."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def shards(home) -> Path:
    folder = home / "shards" / "shapes"
    pack(folder, Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
    return folder


@pytest.fixture(scope="session")
def chain(home, shards) -> Chain:
    """Run folders of an autoencoder, a CLIP and a diffusion on it, each trained for eight steps."""
    chain = Chain(home / "runs" / "demo", shards, home / "shards" / "shapes-latents")
    with contextlib.chdir(home):
        assert fit.main(chain.arguments("autoencoder")) == 0
        assert fit.main(chain.arguments("clip")) == 0
        assert encode.main(chain.encode()) == 0
        assert fit.main(chain.arguments("diffusion")) == 0
    return chain


@pytest.fixture(autouse=True)
def at_home(chain, home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture
def fresh(chain, tmp_path) -> Chain:
    """The same data and upstream runs, and a folder of one's own for further runs."""
    return Chain(tmp_path / "runs", chain.shards, chain.latents)
