"""What all tests share: one thread, and programs of the system.

One thread, set before torch is imported: small work is fastest so on a busy machine. In the environment, so
that processes started by tests have as many: runs that are compared bit for bit must.
"""

import os
import shutil

import pytest

os.environ["OMP_NUM_THREADS"] = "1"

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
def programs():
    """Finds programs of the system; without one a test is skipped, but in CI, which installs it, fails."""

    def find(package, *names):
        found = [shutil.which(name, path=PATH) for name in names]
        if lacking := [name for name, path in zip(names, found, strict=True) if path is None]:
            message = f"{', '.join(lacking)} not found: apt-get install {package}"
            (pytest.fail if os.environ.get("LDM_CI") else pytest.skip)(message)
        return found

    return find
