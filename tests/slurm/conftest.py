"""The cluster, and shards to train on."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from cluster import PROGRAMS, Cluster
from jobs import ROOT, SUPPORT

from data.shapes.packer import Settings, pack


@pytest.fixture(scope="session")
def cluster(programs):
    programs("slurm-wlm munge", *PROGRAMS)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    cluster.environment |= {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{SUPPORT}"}
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
