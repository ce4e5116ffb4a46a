"""The Inception network costs half a second an image here: once for all tests."""

import pytest

from benchmarks.metrics import compare, write_random_inception


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights in the format of the published file."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    write_random_inception(path)
    return str(path)


@pytest.fixture(scope="session")
def agreement(inception_file):
    """Numbers of 10 against 10 images, by this project and by others."""
    return compare(inception_file, 10, subset_size=8)
