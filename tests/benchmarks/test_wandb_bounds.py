"""What a run sends to W&B: the table of the docs is that of the benchmark."""

from pathlib import Path

from benchmarks.wandb.bounds import bounds
from ldm.runs.recipe import CONFIGS

PAGE = Path(__file__).parents[2] / "docs" / "comparing-runs.md"


def test_the_docs_have_the_table_of_the_benchmark_with_all_of_the_demo():
    table = list(bounds())
    shown = [line for line in PAGE.read_text().splitlines() if line.endswith("|") and line in table]
    names = {line.split("|")[1].strip() for line in shown[2:]}
    found = [path.relative_to(CONFIGS) for path in CONFIGS.glob("demo/**/[!_]*.yaml")]
    demo = {str(path.with_suffix("")) for path in found}
    assert demo <= names and len(names) > len(demo)
