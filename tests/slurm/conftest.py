"""The cluster, and shards to train on."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from cluster import Cluster, missing

from data.shapes_packer import Settings, pack


@pytest.fixture(scope="session")
def cluster():
    if lacking := missing():
        message = f"no SLURM here, {', '.join(lacking)} not found: apt-get install slurm-wlm munge"
        (pytest.fail if os.environ.get("LDM_CI") else pytest.skip)(message)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    pack(folder, Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
    return folder
