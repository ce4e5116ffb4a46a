"""Configurations that build on others: found by path or short name, merged from the lowest on."""

import re
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from ldm.cli import error_line
from ldm.runs.recipe import CONFIGS, Recipe, find, layers, merged
from ldm.training import build


def written(folder, **files):
    for name, content in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return folder / f"{next(iter(files))}.yaml"


def names(path):
    return [layer.stem for layer, _ in layers(path)]


def test_bases_precede_a_configuration(tmp_path):
    path = written(tmp_path, a={"base": ["b.yaml", "c.yaml"], "x": 1}, b={"base": "d.yaml"}, c={}, d={"x": 2})
    assert names(path) == ["d", "b", "c", "a"]
    assert [content for _, content in layers(path)] == [{"x": 2}, {}, {}, {"x": 1}]


def test_one_may_be_built_on_twice_but_not_by_itself(tmp_path):
    path = written(
        tmp_path, a={"base": ["b.yaml", "c.yaml"]}, b={"base": "d.yaml"}, c={"base": "d.yaml"}, d={}
    )
    assert names(path) == ["d", "b", "d", "c", "a"]
    path = written(tmp_path, a={"base": "b.yaml"}, b={"base": "a.yaml"})
    with pytest.raises(ValueError, match=r"b.yaml: base: builds on itself, by way of .*a.yaml"):
        names(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"base": "nowhere.yaml"},
            r"a.yaml: base: '.*nowhere.yaml' cannot be read \(No such .*, or a name such as demo/clip$",
        ),
        ({"base": 3}, r"a.yaml: base: got 3, expected a file or a list of files"),
        ({"base": ["b.yaml", None]}, r"a.yaml: base: got \['b.yaml', None\], expected a file or"),
        ("a list\n", r"a.yaml: is a str, expected keys and values"),
        ("data: ][\n", r"a.yaml: is no YAML: .*line 1"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        list(layers(written(tmp_path, a=content, b={})))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"trainr": 3}, "b.yaml: got the unknown key 'trainr', did you mean trainer?"),
        ({"trainer": {"max_stepss": 3}}, "b.yaml: got the unknown key 'trainer.max_stepss', did you mean"),
        ({"data": {"batch_size": "x"}}, "b.yaml: data.batch_size: got x, expected int"),
        (
            {"model": {"init_args": {"nett": 1}}},
            "b.yaml: model: got the unknown key 'nett', did you mean net?",
        ),
    ],
)
def test_what_a_file_has_wrong_is_said_with_its_name(tmp_path, content, says):
    below = {"model": {"class_path": "Autoencoder"}, "trainer": {"callbacks+": []}}
    path = written(tmp_path, a={"base": "b.yaml"}, b={"base": "c.yaml", **content}, c=below)
    with pytest.raises(Exception) as caught:
        build(["--config", str(path), "--run", str(tmp_path / "run")])
    assert says in error_line(caught.value).removeprefix("error: ")


def test_a_file_comes_before_a_name_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("demo/clip") == find("configs/demo/clip.yaml") == CONFIGS / "demo" / "clip.yaml"
    written(tmp_path / "configs" / "demo", clip={})
    assert find("configs/demo/clip.yaml").resolve() == tmp_path / "configs" / "demo" / "clip.yaml"
    with pytest.raises(ValueError, match="--config: 'demo/clop' does not exist, expected a file, or a"):
        find("demo/clop")


def test_a_base_is_a_file_beside_it_or_a_name_of_the_package(tmp_path):
    path = written(tmp_path, a={"base": "own/64/autoencoder"})
    assert list(layers(path))[:-1] == list(layers(find("own/64/autoencoder")))
    written(tmp_path / "own" / "64", autoencoder={"run": "mine"})
    (tmp_path / "own" / "64" / "autoencoder").write_text("run: this file\n")
    assert [content for _, content in layers(path)] == [{"run": "this file"}, {}]


def test_the_example_of_a_configuration_of_ones_own_is_complete(tmp_path, capsys):
    example = re.search(r"```yaml\n(.*?)```", (CONFIGS / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    path = written(tmp_path, mine=example[1])
    assert [layer for layer, _ in layers(path)][-2] == find("own/64/autoencoder")
    with pytest.raises(SystemExit) as done:
        build(["--config", str(path), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert done.value.code == 0 and shown["run"] == "runs/mine/autoencoder"
    assert shown["model"]["init_args"]["net"]["init_args"]["block_out_channels"] == [32, 64, 128]


def test_numbers_are_read_as_in_any_configuration(tmp_path):
    assert next(layers(written(tmp_path, a="lr: 1e-3\n")))[1] == {"lr": 0.001}


def test_merged_values_of_one_class(tmp_path):
    low = "model: {class_path: A, init_args: {n: 1, x: 2}}\ndata: {size: 3, s: [1]}\n"
    (tmp_path / "low.yaml").write_text(low)
    (tmp_path / "mine.yaml").write_text("base: low.yaml\nmodel: {init_args: {n: 4}}\ndata: {s: [2]}\n")
    (tmp_path / "other.yaml").write_text("base: mine.yaml\nmodel: {class_path: B}\n")
    found = merged(str(tmp_path / "mine.yaml"))
    assert found["model"] == {"class_path": "A", "init_args": {"n": 4, "x": 2}}
    assert found["data"] == {"size": 3, "s": [2]}
    assert merged(str(tmp_path / "other.yaml"))["model"] == {"class_path": "B"}


class Net:
    def __init__(self, sizes: dict[str, Any], names: list[str] | None = None):
        pass


def test_an_argument_that_is_a_mapping_is_merged_and_a_list_appended_once(tmp_path):
    above = {"base": "b.yaml", "net": {"sizes": {"width": 3}, "names+": ["y"]}}
    below = {"net": {"sizes": {"width": 2, "patch": {"x": 1}}, "names+": ["x"]}}
    path = written(tmp_path, a=above, b=below)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=Recipe)
    parser.add_class_arguments(Net, "net")
    net = parser.parse_args([f"--config={path}"]).net
    assert net.as_dict() == {"sizes": {"width": 3, "patch": {"x": 1}}, "names": ["x", "y"]}
    parser.set_defaults({"net.sizes": {"other": 1}})
    assert parser.parse_args([f"--config={path}"]).net.sizes == {"width": 3, "patch": {"x": 1}}
