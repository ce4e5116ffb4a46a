"""Errors become one line with the innermost reason and its key or option."""

from collections.abc import Sequence

import pytest
import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import nn
from torch.utils.data import DataLoader

from ldm import cli, import_exports
from ldm.cli import Reason, command_parser, error_line, naming, run_command
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.samplers.sampler import Sampler
from ldm.sample import Strength

import_exports(["ldm.diffusion", "ldm.diffusion.samplers"])  # as commands do, so that DDIM is a name


class Layer:
    """A class within a class.

    Args:
        width: Even.
        inner: Another.
    """

    def __init__(self, width: int = 2, inner: "Layer | None" = None) -> None:
        if width % 2:
            raise ValueError(f"width: got {width}, expected an even number")
        if width == 100:
            raise ValueError("cannot be so wide")
        if width == 102:
            {}["absent"]
        if width == 104:
            try:
                {}["absent"]
            except KeyError as error:
                raise ValueError("is absent") from error


def parser(command: bool = True) -> ArgumentParser:
    made = command_parser("ldm.tried", "Tried.") if command else ArgumentParser(exit_on_error=False)
    made.add_argument("--num", type=PositiveInt, default=1)
    made.add_argument("--num-workers", type=NonNegativeInt | None)
    made.add_argument("--steps", type=PositiveInt, nargs="+", default=[])
    made.add_argument("--strength", type=Strength | None)
    made.add_argument("--sampler", type=Sampler | None)
    made.add_argument("--guidance", type=float | Guidance, nargs="+")
    made.add_argument("--part", type=Layer | None)
    made.add_argument("--parts", type=list[Layer] | Layer | bool | None)
    return made


def error_for(arguments: Sequence[str], command: bool = True) -> str:
    """Return the error line for a command line, whose classes are built."""
    made = parser(command)
    with pytest.raises(Exception) as caught:
        made.instantiate(made.parse_args(arguments))
    assert Reason.of(caught.value).is_of_input()
    return error_line(caught.value).removeprefix("error: ")


OUTER, INNER = (
    '{"class_path": "test_cli.Layer", "init_args": ',
    '{"class_path": "test_cli.Layer", "init_args": %s}',
)
DEEP = OUTER + '{"inner": ' + INNER + "}}"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--num=0"], "--num: got 0, expected a number >0"),
        (["--num=x"], "--num: got x, expected int"),
        (["--num-workers=-1"], "--num-workers: got -1, expected a number >=0"),
        (["--num-workers=many"], "--num-workers: got many, expected int"),
        (["--steps", "1", "0"], "--steps: got 0, expected a number >0"),
        (["--strength=2"], "--strength: got 2, expected a number >0 and <=1"),
        (["--sampler=DDIN"], "--sampler: got DDIN, expected the import path of a class, such as "
         "package.module.Class, did you mean DDIM?"),
        (["--sampler=nowhere.DDIM"], "--sampler: No module named 'nowhere'"),
        (["--sampler=DDIM", "--sampler.etaa=3"], "--sampler: got the unknown key 'etaa', did you mean eta?, "
         "expected of DDIM: num_steps, eta, spacing"),
        (["--guidance", "1", "x"], "--guidance: got x, expected float or the import path of a class, such as "
         "package.module.Class"),
        (["--guidance", '{"class_path": "Rescaled", "init_args": {"scale": "x"}}'],
         "--guidance.scale: got x, expected float"),
        (["--nun=3"], "unrecognized arguments: --nun=3, did you mean --num?"),
        (["--part=test_cli.Layer", "--part.width=3"], "--part: Layer: width: got 3, expected an even number"),
        (["--part", DEEP % '{"width": 100}'], "--part.inner: Layer: cannot be so wide"),
        (["--part", DEEP % '{"width": 102}'], "--part.inner: Layer: KeyError: 'absent'"),
        (["--part", DEEP % '{"width": 104}'], "--part.inner: Layer: is absent"),
        (["--part", DEEP % '{"widht": 4}'], "--part.inner: got the unknown key 'widht', did you mean width?, "
         "expected of Layer: width, inner"),
        (["--parts", "[" + DEEP % '{"width": 100}' + "]"], "--parts.inner: Layer: cannot be so wide"),
        (["--parts", "[" + DEEP % '{"width": "x"}' + "]"], "--parts.inner.width: got x, expected int"),
    ],
)  # fmt: skip
def test_innermost_reason_with_its_option(arguments, line):
    assert error_for(arguments) == line


@pytest.mark.parametrize(
    ("found", "line"), [("007", "got 7"), ("yes", "got True"), ("1:00:00:00", "got 216000")]
)
def test_text_that_yaml_takes_for_something_else_is_to_be_quoted(found, line):
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--name", type=str)
    with pytest.raises(Exception) as caught:
        made.parse_object({"name": yaml.safe_load(found)})
    assert error_line(caught.value) == f"error: name: {line}, expected text: quote it"


def test_a_configuration_names_keys():
    assert error_for(["--num-workers=x"], command=False) == "num_workers: got x, expected int"


def test_long_values_are_shortened_and_the_reason_stays():
    line = error_line(ValueError(f"--prompts: '{'/very/long' * 100}' cannot be read: it is a folder"))
    assert len(line) < 150
    assert line.startswith("error: --prompts: '") and line.endswith("cannot be read: it is a folder")
    line = error_line(ValueError(f"data.train: {'many words ' * 100}: expected shards"))
    assert len(line) == cli.LIMIT
    assert line.startswith("error: data.train: many") and line.endswith(": expected shards")


class Broken:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise ValueError("train-000000.tar: sample 'a': is no image")


def test_a_worker_s_error_is_its_own_message():
    with pytest.raises(ValueError) as caught:
        list(DataLoader(Broken(), num_workers=1))  # type: ignore[arg-type]
    assert error_line(caught.value) == "error: train-000000.tar: sample 'a': is no image"


def test_a_bug_keeps_its_traceback(capsys, monkeypatch):
    def bug() -> None:
        raise KeyError("absent")

    def bad() -> None:
        raise ValueError("--num: got 0")

    with pytest.raises(KeyError):
        run_command(bug)
    assert run_command(bad) == 2
    assert capsys.readouterr().err == "error: --num: got 0\n"
    monkeypatch.setenv("LDM_TRACEBACK", "1")
    with pytest.raises(ValueError):
        run_command(bad)


@pytest.mark.parametrize("said", ["templates: got none", "'a.txt' does not exist"])
def test_an_option_is_named_once_and_as_it_is_typed(said):
    with pytest.raises(ValueError) as caught, naming("--classes", "--templates"):
        raise FileNotFoundError(said)
    assert str(caught.value) == {"t": "--templates: got none"}.get(said[0], f"--classes: {said}")


def test_missing_options_are_named_as_typed():
    made = command_parser("ldm.tried", "Tried.")
    made.add_argument("--the-file", type=str, required=True)
    made.add_argument("names", type=str, nargs="+")
    with pytest.raises(Exception) as caught:
        made.parse_args(["a"])
    assert error_line(caught.value) == "error: --the-file: missing, but required"


@pytest.mark.parametrize(
    ("then", "now", "advice"),
    [
        ({"net": 2}, {"net": 2, "terms": 40}, "start another --run with --weights THIS_RUN"),
        ({"net": 2, "terms": 3}, {"net": 2, "terms": 2}, "start another --run with --weights THIS_RUN"),
        ({"net": 2, "terms": 3}, {"net": 3, "terms": 3}, "expected its networks, or a fresh --run"),
        ({"net": 1}, {"net": 2, "terms": 2}, "expected its networks, or a fresh --run"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_to_do(then, now, advice):
    saved, other = (
        nn.ModuleDict({name: nn.Sequential(*[nn.Linear(n, n)] * n) for name, n in sizes.items()})
        for sizes in (then, now)
    )
    with pytest.raises(RuntimeError) as caught:
        other.load_state_dict(saved.state_dict())
    line = error_line(caught.value)
    assert line.startswith("error: the checkpoint does not fit model of the configuration: ")
    assert line.endswith(f": {advice}") and len(line) <= 300
