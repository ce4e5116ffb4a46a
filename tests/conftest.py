"""What all tests share: one thread, no GPU but for tests of it, and programs of the system.

One thread, set before torch is imported: small work is fastest so on a busy machine. In the environment, so
that processes started by tests have as many: runs that are compared bit for bit must.
"""

import os
import shutil

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONFAULTHANDLER"] = "1"  # a process that a signal ends says where it was

import torch

NUM_GPUS = torch.cuda.device_count()
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what tests compare bit for bit is computed on a CPU

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
"""Where programs are looked for; those of the system's administrator too."""


@pytest.fixture(autouse=True)
def _restore_environment():
    """What a test's Trainer leaves in the environment (where its processes met) is not for those after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def num_gpus() -> int:
    """GPUs of this machine."""
    return NUM_GPUS


@pytest.fixture(scope="session")
def on_gpu() -> dict[str, str]:
    """The environment of a process that sees the GPUs, and computes in whole float32 on them."""
    if NUM_GPUS == 0:
        pytest.skip("needs a GPU")
    hidden = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = {} if VISIBLE is None else {"CUDA_VISIBLE_DEVICES": VISIBLE}
    return {**hidden, **visible, "NVIDIA_TF32_OVERRIDE": "0"}


@pytest.fixture(scope="session")
def programs():
    """Finds programs of the system; without one a test is skipped, but in CI, which installs it, fails."""

    def find(package, *names):
        found = [shutil.which(name, path=PATH) for name in names]
        if lacking := [name for name, path in zip(names, found, strict=True) if path is None]:
            message = f"{', '.join(lacking)} not found: apt-get install {package}"
            (pytest.fail if os.environ.get("LDM_CI") else pytest.skip)(message)
        return found

    return find
