"""Recipes in miniature: every stage is trained and charged, and a finished one is not charged again."""

import pytest

from data.shapes.packer import Settings, pack

recipes = pytest.importorskip("benchmarks.recipes")


@pytest.mark.slow
def test_each_stage_is_charged_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack(tmp_path / "shards/shapes", Settings(train=80, val=4, novel=8, pairs=8, shard_size=4))
    tiny = (*recipes.steps(2), "--data.batch_size=8", "--sample_grid.num=2")
    autoencoder = recipes.Training("autoencoder", "demo/fast/autoencoder", tiny)
    clip = recipes.Training("clip", "demo/fast/clip", tiny)
    workshop = recipes.Workshop(seed=3)
    run, seconds = workshop.make("tiny", recipes.Recipe(autoencoder, clip, tiny))
    assert tuple(seconds) == recipes.STAGES
    assert all(spent > 0.1 for spent in seconds.values())
    assert recipes.right(run, 8).keys() >= set(recipes.FIELDS)
    workshop.train(clip)
    assert recipes.Workshop(seed=3).times.seconds["clip"] == seconds["clip"]
