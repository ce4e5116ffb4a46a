"""Bitwise comparison of two runs; the error message of a command."""

import csv

import torch

from ldm import fit

TIMES = ("data_wait", "images_per_second", "step_seconds", "time_", "mfu")


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]


def assert_equal(a, b, path="checkpoint"):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def assert_same_run(run, uninterrupted):
    ours, theirs = state(run), state(uninterrupted)
    for part in ("state_dict", "callbacks", "optimizer_states", "lr_schedulers", "Shards", "progress"):
        assert_equal(ours[part], theirs[part], part)
    assert metrics(run) == metrics(uninterrupted)


def error_of(capsys, arguments, main=fit.main):
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("Warning")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
