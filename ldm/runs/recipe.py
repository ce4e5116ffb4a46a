"""Configurations that build on others."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader
from typing_extensions import override

from ldm.cli import instead

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(f for f in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if (f / "base.yaml").is_file())
"""The configurations that come with this package: those of the repository, or those in an installed wheel."""

_load = get_loader("yaml")  # it knows that 1e-3 is a number


def find(name: str) -> Path:
    """Find a configuration: a file, or the name of one that comes with this package, e.g. ``demo/clip``.

    Raises:
        ValueError: If there is neither.
    """
    for path in (Path(name), *_supplied(name)):
        if path.is_file():
            return path
    raise ValueError(f"--config: '{name}' does not exist, expected a file, or a name such as demo/clip")


def _supplied(name: str) -> tuple[Path, Path]:
    return CONFIGS / f"{name}.yaml", CONFIGS.parent / name


def _base(path: Path, name: str) -> Path:
    """Find what a configuration builds on: a file relative to it, else as ``--config`` does."""
    return next(
        (found for found in (path.parent / name, *_supplied(name)) if found.is_file()), path.parent / name
    )


def layers(path: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """List a configuration and what it builds on, the lowest first.

    Args:
        path: YAML file. Its key ``base`` names what it builds on, one or several in order: files relative to
            it, or names such as demo/clip.
        above: Files that build on it.

    Yields:
        File and content, without ``base``.

    Raises:
        ValueError: If a file is missing or no YAML mapping, or builds on itself.
    """
    if path.resolve() in above:
        raise ValueError(f"{above[-1]}: base: builds on itself, by way of {path}")
    try:
        content = _load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(
            f"{above[-1]}: base: '{path}' cannot be read ({error.strerror}), expected a file relative to "
            "this one, or a name such as demo/clip"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is a {type(content).__name__}, expected keys and values")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base: got {bases}, expected a file or a list of files")
    for base in bases:
        yield from layers(_base(path, base), (*above, path.resolve()))
    yield path, content


def merged(name: str) -> dict[str, Any]:
    """Read a configuration with what it builds on, without base.yaml and the defaults of classes."""
    return reduce(_merge, (content for _, content in layers(find(name))), {})


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay values over others: mappings are merged, but a class takes no arguments of another one."""
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    nested = {
        key: _merge(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **nested}


def _without_appended(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys such as ``callbacks+``, which would append once more."""
    kept = {key: value for key, value in content.items() if not key.endswith("+")}
    return {key: _without_appended(v) if isinstance(v, dict) else v for key, v in kept.items()}


class Recipe(ActionConfigFile):
    """``--config``: applies what a configuration builds on, then the configuration."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        found: dict[str, Any] = {}
        for path, content in layers(find(values)):
            # the parser replaces an argument that is a mapping: it gets the merged one of all files
            found = _merge(_without_appended(found), content)
            text = yaml.safe_dump({key: found[key] for key in content}, sort_keys=False)
            check_keys(content, [action.dest for action in parser._actions], str(path))
            try:
                self.apply_config(parser, cfg, self.dest, text)
            except Exception as error:
                error.add_note(str(path))
                raise


def check_keys(content: dict[str, Any], known: Sequence[str], path: str, above: str = "") -> None:
    """Check the keys of a configuration that no class takes: those of classes are checked with their values.

    Args:
        content: What the file says, below the key ``above`` and a dot.
        known: Dotted keys that there are.
        path: The file.
        above: Where its keys belong.

    Raises:
        ValueError: If there is no such key; it names the file.
    """
    for name, value in content.items():
        key = f"{above}{name}".removesuffix("+")
        is_group = any(each.startswith(f"{key}.") and not each.endswith(".help") for each in known)
        if is_group and isinstance(value, dict):
            check_keys(value, known, path, f"{key}.")
        elif not is_group and key not in known:
            raise ValueError(f"{path}: got the unknown key '{key}'{instead(key, known)}")


def names_class(key: str, arguments: Sequence[str]) -> bool:
    """Whether a command line, or a configuration that it names, has a class path under ``key``.

    Args:
        key: Of a configuration, e.g. "data".
        arguments: The command line. What cannot be read is left to the parser proper.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    options = {"path": [f"--{key}.class_path"], "value": [f"--{key}"], "config": ["-c", "--config"]}
    for dest, names in options.items():
        parser.add_argument(*names, dest=dest, nargs="?", action="append", default=[])
    found = parser.parse_known_args(arguments)[0]
    if any(found.path):
        return True
    try:
        given = [Path(v).read_text() if Path(v).is_file() else v for v in filter(None, found.value)]
        values = [_load(text) for text in given]
        for name in filter(None, found.config):
            values += [content.get(key) for _, content in layers(find(name))]
    except (ValueError, OSError, yaml.YAMLError):
        return False
    return any(isinstance(v, str) or (isinstance(v, dict) and "class_path" in v) for v in values)
