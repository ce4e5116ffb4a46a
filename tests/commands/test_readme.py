"""Every command of README and of five pages exists and takes the options that it is shown with."""

import importlib.util
import re
import shlex

import pytest
from tiny_runs import ROOT

from ldm import compare, convert, encode, evaluate, fit, inspect, sample, sync
from ldm.loggers import workspace

DOCS = ("own-images", "autoencoder", "averages", "sampling", "comparing-runs", "text-encoders")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS)]
PARSED = {
    "ldm.sample": sample,
    "ldm.encode": encode,
    "ldm.convert": convert,
    "ldm.compare": compare,
    "ldm.inspect": inspect,
    "ldm.sync": sync,
    "ldm.evaluate": evaluate,
    "ldm.loggers.workspace": workspace,
}


def commands():
    """Lines of the bash blocks, continued lines joined, without comments and prompts."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [part.strip() for line in lines if line and line[0] != "#" for part in line.split("&&")]


def parse(module, arguments):
    if module == "ldm.fit":
        assert fit.main([*arguments, "--print_config"]) == 0
    elif module in PARSED:
        PARSED[module].parser().parse_args(arguments)
    else:
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("command", commands() or [""])
def test_a_command_of_the_readme_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command, comments=True) if word != "--"]  # torchrun's
    if words[:1] == ["make"]:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif scripts := [word for word in words if word.startswith("slurm/")]:
        assert all((ROOT / script).is_file() for script in scripts)
        if "--config" in words:
            parse("ldm.fit", words[words.index("--config") :])
    elif "-m" in words:
        index = words.index("-m")
        parse(words[index + 1], words[index + 2 :])


def test_the_help_of_every_command_is_there(capsys):
    for command in (fit, *PARSED.values()):
        try:
            code = command.main(["--help"])
        except SystemExit as done:
            code = done.code
        assert code == 0
        shown = capsys.readouterr().out
        assert f"python -m {command.__name__}" in shown
        assert "--" in shown
