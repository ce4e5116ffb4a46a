"""Tars and images that are damaged in 2,000 ways: counted by reason, and nothing else happens."""

import io
import tarfile
from random import Random

from benchmarks import fuzz


def test_no_damage_has_another_end_than_the_ones_meant():
    reasons, failed = fuzz.fuzz(0, 2000, 0, 10.0)
    assert failed == []
    kinds = {"good", "broken shard", "broken stream", "unreadable image", "unreadable latent"}
    assert kinds | {"malformed caption", "malformed label", "malformed json"} <= set(reasons)
    assert all(reasons[kind] > 20 for kind in kinds)


def test_what_is_not_damaged_is_read_whole(tmp_path):
    intact = fuzz.packed(fuzz.members(), tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(intact)
    reasons = fuzz.Counter()
    assert len(fuzz.read_indexed(tmp_path / "a.tar", reasons)) == 4
    fuzz.read_streamed(intact, set(), reasons)
    assert set(reasons) == {"good"}


def test_each_kind_of_damage_changes_the_tar_and_is_a_function_of_its_number():
    intact = fuzz.packed(fuzz.members(), tarfile.USTAR_FORMAT)
    for damage in (fuzz.flipped, fuzz.shortened, fuzz.of_headers):
        assert damage(intact, Random(1)) == damage(intact, Random(1))
        assert any(damage(intact, Random(seed)) != intact for seed in range(5))  # a field may be as it was
    names = [name for n in range(40) for name in names_of(fuzz.mutated(Random(f"0/{n}")))]
    assert any("escaped" in name for name in names)


def names_of(content):
    try:
        with tarfile.open(fileobj=io.BytesIO(content), errors="backslashreplace") as tar:
            return tar.getnames()
    except (tarfile.TarError, ValueError, OverflowError):
        return []
