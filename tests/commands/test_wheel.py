"""An installed wheel works from an empty folder: commands, packers, configurations."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_runs import ROOT

pytestmark = pytest.mark.slow
SHAPES = [
    "--train",
    "60",
    "--val",
    "20",
    "--novel",
    "0",
    "--pairs",
    "0",
    "--shard-size",
    "20",
    "--workers",
    "1",
]
TRAIN = "shards/{}/train-{{000000..000002}}.tar"
TINY = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--wandb.mode=disabled",
    "--data.batch_size=8",
    "--sample_grid.num=2",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("ldm-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def test_every_configuration_is_in_the_wheel(site):
    found = {str(path.relative_to(site / "ldm")) for path in (site / "ldm" / "configs").rglob("*.yaml")}
    assert found == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}


def test_nothing_else_is_in_the_wheel(site):
    (wheel,) = site.parent.glob("ldm-*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ldm", "data"}


def test_the_chain_runs_from_an_empty_folder(site, tmp_path):
    def run(*command):
        environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *command]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fit(name, shards, *more):
        return run("ldm.fit", f"--config=demo/{name}", *TINY, f"--data.train={TRAIN.format(shards)}", *more)

    where = "import data.shapes, ldm; print(ldm.__file__, data.shapes.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert all(path.startswith(str(site)) for path in done.stdout.split())
    run("data.shapes", "--out", "shards/shapes", *SHAPES)
    fit("autoencoder", "shapes")
    fit("clip", "shapes")
    run(
        "ldm.encode",
        "--autoencoder=runs/demo/autoencoder",
        "--shards",
        TRAIN.format("shapes"),
        "--out=shards/shapes-latents",
    )
    fit(
        "diffusion",
        "shapes-latents",
        "--model.sampler.num_steps=2",
        "--model.denoiser.block_out_channels=[32,64]",
    )
    run(
        "ldm.sample",
        "--checkpoint=runs/demo/diffusion",
        "--prompt=a red circle",
        "--steps=2",
        "--out=samples",
    )
    assert len(list((tmp_path / "samples").glob("*.png"))) >= 1
    assert not Path(site / "runs").exists()
