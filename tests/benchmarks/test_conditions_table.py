"""The table of conditions takes the last evaluation and ignores other rows."""

from benchmarks.conditions import last_evaluation


def test_the_last_evaluation_counts(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,train/loss,val/caption/all,val/map/objects\n1,.5,,\n1,,.25,\n2,.4,,\n2,,.75,\n3,.3,,\n"
    )
    assert last_evaluation(tmp_path) == {"caption/all": 0.75}
