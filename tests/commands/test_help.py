"""Help of ldm.fit: quick, and of the same options as the parser that trains."""

import subprocess
import sys

import pytest
from tiny_runs import ROOT

from ldm import fit, training
from ldm.runs.options import FIELDS


@pytest.mark.slow
def test_help_is_shown_without_lightning():
    commands = [["--help"], ["--config", "demo/clip", "-h"], []]
    code = f"import sys; from ldm import fit; print('codes', *map(fit.main, {commands})); "
    code += "sys.exit('lightning' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("[--ckpt_path CKPT_PATH]") == 3
    assert result.stdout.endswith("codes 0 0 2\n")


def test_help_names_every_option_of_the_parser(tmp_path):
    cli = training.build(["--config", "demo/autoencoder", f"--run={tmp_path}"])
    full = {option for action in cli.parser._actions for option in action.option_strings}
    light = {option for action in fit.help_parser()._actions for option in action.option_strings}
    assert light <= full
    options = {option for option in full if option.startswith("--") and " " not in option}  # no links
    options -= {"--print_shtab"}  # there if shtab is installed
    rest = {option.removeprefix("--").rstrip("+") for option in options - light}
    assert {option.partition(".")[0] for option in rest} == FIELDS.keys()
    described = {name: text.partition(":")[0].split(", ") for name, text in FIELDS.items() if ":" in text}
    fields = {name: {o.partition(".")[2] for o in rest if o.startswith(f"{name}.")} for name in described}
    assert {name: set(names) for name, names in described.items()} == fields
