"""Tiny shards and a chain of tiny runs for the tests of the commands."""

import contextlib
import os
import tarfile
from pathlib import Path

import pytest
from filelock import FileLock
from tiny_runs import Chain

from data.shapes.packer import Settings, pack
from ldm import encode, fit


def chain_in(home: Path) -> Chain:
    shards = home / "shards" / "shapes"
    return Chain(home / "runs" / "demo", shards, home / "shards" / "shapes-latents")


def train(home: Path) -> None:
    """Pack shards, and train an autoencoder, a CLIP and a diffusion on them, each for eight steps."""
    chain = chain_in(home)
    pack(chain.shards, Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
    with contextlib.chdir(home):
        assert fit.main(chain.arguments("autoencoder")) == 0
        assert fit.main(chain.arguments("clip")) == 0
        encode_in(home)
        assert fit.main(chain.arguments("diffusion")) == 0


def encode_in(home: Path) -> None:
    with contextlib.chdir(home):
        assert encode.main(chain_in(home).encode()) == 0


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A stand-in for the root of the repository, where commands are run, with the chain in it.

    Where pytest-xdist runs several processes, the first that needs it trains; the others copy what it left,
    but for latents, which name their autoencoder by its absolute path.
    """
    home = tmp_path_factory.mktemp("home")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        train(home)
        return home
    trained = tmp_path_factory.getbasetemp().parent / "home.tar"  # keeps hard links
    with FileLock(f"{trained}.lock"):
        if not trained.exists():
            train(home)
            with tarfile.open(trained, "w") as file:
                file.add(home, ".")
            return home
    with tarfile.open(trained) as file:
        members = [member for member in file if "shapes-latents" not in member.name]
        file.extractall(home, members, filter="data")
    encode_in(home)
    return home


@pytest.fixture(scope="session")
def chain(home) -> Chain:
    """Run folders of an autoencoder, a CLIP and a diffusion on it, each trained for eight steps."""
    return chain_in(home)


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture
def fresh(chain, tmp_path) -> Chain:
    """The same data and upstream runs, and a folder of one's own for further runs."""
    return Chain(tmp_path / "runs", chain.shards, chain.latents)
