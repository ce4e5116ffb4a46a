"""The versions that the commands of the README install: one of each package on every Python, no address."""

import importlib.metadata
import os
import re
import sysconfig
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = [Requirement(line) for line in LINES]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SYSTEMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))


def pinned(python, system):
    """Version of each package in an environment, by name; each has one at most."""
    platform, machine = system
    there = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform}
    environment = {**default_environment(), **there, "platform_machine": machine}
    found = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}
    assert len(versions) == len(found)
    return versions


def test_only_names_and_versions_are_reported():
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.!]+( ; [\w.<>=!' ()]+)?", line), line


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_dependency_has_a_version_within_its_bounds(python, system):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pinned(python, system)
    for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
        needed = Requirement(text)
        if needed.name != "ldm":
            assert needed.specifier.contains(versions[canonicalize_name(needed.name)]), text


@pytest.mark.skipif(not os.environ.get("LDM_CI"), reason="only CI insists on them: others may try newer ones")
def test_installed_versions_equal_the_file():
    here = {pin.name: str(pin.specifier) for pin in PINS if pin.marker is None or pin.marker.evaluate()}
    pins = {canonicalize_name(name): version for name, version in here.items()}
    folders = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    }  # not what setuptools brings inside
    found = importlib.metadata.distributions(path=sorted(folders))
    installed = {canonicalize_name(d.name): f"=={d.version}" for d in found}
    assert {name for name, version in installed.items() if pins.get(name) != version} <= {"ldm", "pip"}
