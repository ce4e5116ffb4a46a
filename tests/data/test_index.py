"""The index of a shard: agreement with tarfile and webdataset, staleness, and broken files."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import sample, write_tar

from ldm.data import index
from ldm.data.fields import whitelist
from ldm.data.index import fingerprint, load_index, scan, sidecar, summarize, summarize_all
from ldm.data.tar import expand, members, split_name


def files_of(count: int) -> list[tuple[str, bytes]]:
    return [file for number in range(count) for file in sample(number)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, format):
    long = "folder/" * 12 + "ü" * 40  # too long for the plain header in GNU and PAX
    name = long if format != tarfile.USTAR_FORMAT else "folder/" * 12 + "plain"
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format, pax_headers={"comment": "global"}) as tar:
        for key in ("first", name, "./last"):
            for extension in ("png", "txt"):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = 700
                info.mtime = 1.5  # a fraction needs an extended header in PAX
                tar.addfile(info, _Bytes(700))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert list(members(str(path))) == expected
    found = scan(str(path))
    assert [found.key(row) for row in range(3)] == ["first", name, "last"]


class _Bytes:
    def __init__(self, size):
        self.left = size

    def read(self, size):
        size = min(size, self.left)
        self.left -= size
        return b"x" * size


def test_names_split_as_webdataset_splits_them():
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "f/a.seg.PNG", "f.x/a.b.latent.npy", "f/a", "._a.jpg"):
        key, extension = base_plus_ext(name)
        assert split_name(name) == (key, extension.lower() if extension else "")


def test_members_are_found_where_they_are_and_others_are_ignored(tmp_path):
    files = [*files_of(3), ("000001.pkl", pickle.dumps(0)), ("notes", b"x"), ("000002.seg.png", b"y")]
    path = write_tar(tmp_path / "a.tar", files)
    found, content = scan(str(path)), path.read_bytes()
    assert len(found) == 3
    for row in range(3):
        for extension, offset, size in found.spans(row, whitelist()):
            assert content[offset : offset + size] == dict(files)[f"{row:06d}.{extension}"]
        assert [name for name, _, _ in found.spans(row, whitelist())] == ["png", "txt", "json"]


def test_members_of_a_sample_need_not_be_adjacent(tmp_path):
    path = write_tar(tmp_path / "a.tar", sorted(files_of(3), key=lambda file: file[0].split(".")[1]))
    assert [len(scan(str(path)).spans(row, whitelist())) for row in range(3)] == [3, 3, 3]


def test_the_sidecar_is_used_until_the_shard_changes(tmp_path, monkeypatch):
    path = str(write_tar(tmp_path / "a.tar", files_of(3)))
    first = summarize(path, None)
    assert first.count == 3
    assert {name: n for name, n in first.present.items() if n} == {"png": 3, "txt": 3, "json": 3}
    with monkeypatch.context() as patch:
        patch.setattr(index, "scan", lambda path: pytest.fail("scanned again"))
        assert summarize(path, None) == first
        assert load_index(path, None).key(2) == "000002"
    write_tar(Path(path), files_of(4))
    assert summarize(path, None).count == 4
    assert len(load_index(path, None)) == 4
    os.utime(path, ns=(0, 0))
    assert summarize(path, None).mtime_ns == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz"]


@pytest.mark.parametrize("damage", [b"", b"garbage", "half"])
def test_a_damaged_sidecar_is_rebuilt(tmp_path, damage):
    path = str(write_tar(tmp_path / "a.tar", files_of(3)))
    summarize(path, None)
    default = sidecar(path, None)
    default.write_bytes(default.read_bytes()[:300] if damage == "half" else damage)
    assert summarize(path, None).count == 3


def test_a_sidecar_is_never_unpickled(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", files_of(2)))
    np.savez(sidecar(path, None), summary=np.array([_Trap()], dtype=object), allow_pickle=True)
    assert summarize(path, None).count == 2


class _Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_indices_may_live_in_a_folder_of_their_own(tmp_path):
    paths = [str(write_tar(tmp_path / f"data{n}/a.tar", files_of(n + 1))) for n in range(2)]
    folder = tmp_path / "made" / "indices"
    assert [s.count for s in summarize_all(paths, str(folder))] == [1, 2]
    assert len(list(folder.iterdir())) == 2
    assert [len(load_index(path, str(folder))) for path in paths] == [1, 2]
    assert not list(tmp_path.glob("data*/*.npz"))


def test_an_index_that_cannot_be_written_names_the_setting(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", files_of(2)))
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"cannot be written .*data.reader.init_args.index_dir"):
        summarize(path, str(tmp_path / "file"))


def test_the_fingerprint_depends_on_names_sizes_counts_and_order_only(tmp_path):
    paths = [str(write_tar(tmp_path / f"{n}.tar", files_of(n + 1))) for n in range(3)]
    original = fingerprint(summarize_all(paths, None))
    os.utime(paths[0], ns=(0, 0))
    assert fingerprint(summarize_all(paths, None)) == original
    assert fingerprint(summarize_all(paths[::-1], None)) != original
    write_tar(Path(paths[0]), files_of(2))
    assert fingerprint(summarize_all(paths, None)) != original


def broken(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "middle":
        content = content[:2048] + b"\xff" * 512 + content[2560:]
    path.write_bytes(
        {
            "empty": b"",
            "cut in a member": content[:560],
            "cut at the end": content.rstrip(b"\0").ljust(9 * 1024, b"\0")[: 9 * 1024],
            "text": b"this is no tar at all" * 50,
            "short": b"hello",
            "gzip": gzip.compress(content),
            "middle": content,
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "page": b"<!DOCTYPE html>" + bytes(600),
        }[kind]
    )


@pytest.mark.parametrize(
    "kind, message",
    [
        ("empty", "broken tar: the file is empty"),
        (
            "cut in a member",
            r"broken tar: member '000000.png' at byte 0 needs \d+ bytes, but only \d+ are left",
        ),
        (
            "cut at the end",
            r"broken tar: it ends at byte 9216 without the end-of-archive block: it is cut short",
        ),
        ("text", "broken tar: no valid header at byte 0: the file is not a tar"),
        ("short", "broken tar: the file has 5 bytes, too few"),
        ("gzip", r"broken tar: it is compressed \(gzip\), expected a plain tar"),
        ("pointer", "broken tar: a Git LFS pointer, not the file itself: run 'git lfs pull'"),
        ("page", "broken tar: a web page, not the file itself"),
        ("middle", "broken tar: no valid header at byte 2048: the file is damaged there"),
    ],
)
def test_broken_shards_are_refused_with_a_reason_and_leave_no_sidecar(tmp_path, kind, message):
    path = write_tar(tmp_path / "a.tar", files_of(3))
    broken(path, kind)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        summarize(str(path), None)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_shard_without_known_members_and_one_with_a_member_twice(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.pkl", b"x"), ("b.mp4", b"x")])
    with pytest.raises(
        ValueError, match=r"empty shard: found only members such as 'b.mp4', expected KEY.jpg"
    ):
        scan(str(path))
    write_tar(path, files_of(2) * 2)
    with pytest.raises(ValueError, match=r"member '000000.png' is there twice"):
        scan(str(path))


def test_patterns_expand_by_braces_and_globs_in_a_fixed_order(tmp_path):
    for n in (2, 0, 1):
        (tmp_path / f"x-{n:02d}.tar").touch()
    names = [str(tmp_path / f"x-{n:02d}.tar") for n in range(3)]
    assert expand(str(tmp_path / "x-{00..02}.tar"), "data.train") == names
    assert expand(str(tmp_path / "x-*.tar"), "data.train") == names
    assert expand([names[2], str(tmp_path / "x-{00..01}.tar")], "data.train") == [names[2], *names[:2]]


def test_patterns_that_give_nothing_or_run_programs_are_refused(tmp_path):
    (tmp_path / "x-0.tar").touch()
    cases = [
        ([], ValueError, "data.train: the list of shards is empty"),
        ("", ValueError, "data.train: the list of shards is empty"),
        (str(tmp_path / "y*.tar"), FileNotFoundError, r"data.train: the pattern '.*y\*.tar' matches no file"),
        (
            str(tmp_path / "x-{0..3}.tar"),
            FileNotFoundError,
            "data.train: 3 of 4 shards are missing, the first .*x-1",
        ),
        ([str(tmp_path / "x-0.tar"), str(tmp_path / "*.tar")], ValueError, "listed more than once"),
        ("pipe:touch x", ValueError, "data.train: 'pipe:touch x' would run a program"),
        ("{a,pipe:touch x}", ValueError, "would run a program"),
    ]
    for patterns, kind, message in cases:
        with pytest.raises(kind, match=message):
            expand(patterns, "data.train")


def test_a_path_that_is_there_is_no_glob_and_a_glob_leaves_out_what_is_ours(tmp_path):
    path = str(write_tar(tmp_path / "set[1]" / "train-0.tar", files_of(1)))
    summarize(path, None)
    (tmp_path / "set[1]" / "train-1.tar.tmp-host-1").touch()  # of a packer that was killed
    for pattern in ("train-{0..0}.tar", "train-*", "train-?.tar"):
        assert expand(str(tmp_path / "set[1]" / pattern), "data.train") == [path]
    path = str(write_tar(tmp_path / "what?.tar", files_of(1)))
    assert expand(path, "data.train") == [path]
    write_tar(tmp_path / "set[1]" / "a.tar", files_of(1))
    assert len(expand(str(tmp_path / "set[[]1]" / "*.tar"), "data.train")) == 2


def test_hard_links_are_followed_and_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"pixels")
    (tmp_path / ("b" * 120 + ".png")).hardlink_to(tmp_path / "a.png")  # a long name
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "s.tar", "w", format=format) as tar:
            for name in ("b" * 120 + ".png", "a.png"):
                tar.add(tmp_path / name, name)
            links = {"c.png": (tarfile.SYMTYPE, "/etc/passwd"), "d.png": (tarfile.LNKTYPE, "x")}
            for name, (kind, target) in links.items():
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                tar.addfile(info)
        found, content = scan(str(tmp_path / "s.tar")), (tmp_path / "s.tar").read_bytes()
        assert [found.key(row) for row in range(len(found))] == ["b" * 120, "a"]
        spans = [span for row in range(2) for span in found.spans(row, ["png"])]
        assert [content[offset : offset + size] for _, offset, size in spans] == [b"pixels"] * 2
        assert found.lost == tuple(f"'{name}.png' (a link to no member of the tar)" for name in "cd")


def test_symbolic_links_are_followed_within_the_tar_alone(tmp_path):
    links = {
        "x/b.png": "../a.png",
        "x/c.png": "b.png",
        "d.png": "late.png",
        "e.png": "e.png",
        "f.png": "../a.png",
    }
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        files = [
            ("a.png", b"pixels"),
            *((name, target) for name, target in links.items()),
            ("late.png", b"z"),
        ]
        for name, content in files:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found, content = scan(str(tmp_path / "s.tar")), (tmp_path / "s.tar").read_bytes()
    assert [found.key(row) for row in range(len(found))] == ["a", "x/b", "x/c", "late", "d"]
    spans = [span for row in range(5) for span in found.spans(row, ["png"])]
    bodies = [content[offset : offset + size] for _, offset, size in spans]
    assert bodies == [b"pixels"] * 3 + [b"z"] * 2
    assert found.lost == tuple(f"'{name}.png' (a link to no member of the tar)" for name in "ef")


def test_members_with_dots_in_their_keys_are_counted_and_foreign_ones_of_a_sample_are_not(tmp_path):
    dotted = [("img_1.5x.png", b"x"), ("img_1.5x.txt", b"y")]
    others = [("000002.seg.png", b"x"), ("._000002.png", b"x"), ("notes", b"x"), ("a.b.mp4", b"x")]
    path = str(write_tar(tmp_path / "a.tar", [*files_of(3), *dotted, *others]))
    for _ in range(2):  # scanned, and from the sidecar
        found = summarize(path, None)
        assert (found.count, found.lost) == (3, 2)
        assert found.lost_example == "'img_1.5x.png' (its key ends at the first dot)"


def test_names_in_two_unicode_forms_are_one_sample_unless_each_has_the_member(tmp_path):
    composed, decomposed = "\u00e9", "e\u0301"
    path = str(write_tar(tmp_path / "a.tar", [(f"{decomposed}.png", b"x"), (f"{composed}.txt", b"y")]))
    found = scan(path)
    assert [found.key(0), len(found), len(found.spans(0, whitelist()))] == [decomposed, 1, 2]
    write_tar(
        Path(path), [(f"{form}.{kind}", b"x") for form in (composed, decomposed) for kind in ("png", "txt")]
    )
    assert len(scan(path)) == 2
