"""Settings of all tests: one thread, no GPU but for tests of it, programs of the system, scheduling.

One thread, set before torch is imported: small work is fastest so on a busy machine. In the environment, so
that processes started by tests have as many: runs that are compared bit for bit must.
"""

import os
import re
import shutil
import signal
from collections import Counter

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONFAULTHANDLER"] = "1"  # a traceback from processes that a signal ends

import torch
from hypothesis import settings

from ldm import cli

# Few examples, always the same ones; LDM_TEST_EXAMPLES=5000 looks for new ones.
settings.register_profile("few", derandomize=True, database=None, deadline=None, max_examples=20)
settings.register_profile(
    "many", database=None, deadline=None, max_examples=int(os.environ.get("LDM_TEST_EXAMPLES", "1"))
)
settings.load_profile("many" if "LDM_TEST_EXAMPLES" in os.environ else "few")

if "LDM_TEST_GPUS" not in os.environ:  # for the processes of pytest-xdist, which see none
    os.environ["LDM_TEST_GPUS"] = str(torch.cuda.device_count())
    os.environ["LDM_TEST_VISIBLE"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
NUM_GPUS, VISIBLE = int(os.environ["LDM_TEST_GPUS"]), os.environ["LDM_TEST_VISIBLE"]
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what tests compare bit for bit is computed on a CPU

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
"""Search path of programs, those of the system's administrator included."""


def pytest_collection_modifyitems(config, items):
    """Begin with the files that take longest: those on a SLURM, then by their slow tests.

    Without the slow ones, every other file is one of interop: the second process has work of its own while
    the first one trains the chain of runs that both of them need.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.parent.name != "slurm", -slow[item.path]))
    if config.option.markexpr:
        files = dict.fromkeys(item.path for item in items)
        apart = [path for path in files if path.parent.name == "interop"]
        rank = {path: i for i, path in enumerate(path for path in files if path not in apart)}
        rank |= {path: i + 0.5 for i, path in enumerate(apart)}
        items.sort(key=lambda item: rank[item.path])


@pytest.hookimpl(optionalhook=True)  # pytest-xdist need not be there
def pytest_xdist_auto_num_workers(config):
    """Run as many at once as there are cores, two more if slow ones, which wait, are among them.

    Eight at most, of 3 GB each.
    """
    waiting = 0 if config.option.markexpr else 2
    return min(8, (os.cpu_count() or 1) + waiting)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each file to one process, which makes its fixtures once, and all that need a SLURM to the same."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "slurm" if "/slurm/" in file else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _restore_environment():
    """Undo changes of the environment, such as the rendezvous address of a Trainer."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


NAMED = re.compile(r"--[a-z]|'[^']+'|`\w+|/\w|\w\.\w|^error: [\w.]+: ")
"""An option, a file, a quoted value or a key in a message."""


@pytest.fixture(autouse=True)
def _errors_are_short(monkeypatch):
    """Check every error message of a command in any test: one line of 300 characters that names something."""
    original = cli.error_line

    def checked(error):
        line = original(error)
        assert len(line) <= 300 and "\n" not in line, line
        assert NAMED.search(line), f"names no option, file or key: {line}"
        for noise in ("Union subtypes", "Namespace(", "Traceback", "Given value"):
            assert noise not in line
        return line

    monkeypatch.setattr(cli, "error_line", checked)


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, also if pytest runs in the background, and after the test as before.

    Lightning ignores it once it has seen one, for its process is about to end.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def num_gpus() -> int:
    """GPUs of this machine."""
    return NUM_GPUS


@pytest.fixture(scope="session")
def on_gpu() -> dict[str, str]:
    """The environment of a process with the GPUs visible and TF32 off."""
    if NUM_GPUS == 0:
        pytest.skip("needs a GPU")
    hidden = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = {} if VISIBLE == "all" else {"CUDA_VISIBLE_DEVICES": VISIBLE}
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
