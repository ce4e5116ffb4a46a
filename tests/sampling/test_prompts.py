"""A file of captions is the same captions, whichever program wrote it."""

import pytest

from ldm.conditioners.label import ClassLabel
from ldm.sampling.prompts import Prompt, read_in_chunks, read_prompt_file, read_prompts

CAPTIONS = ["ein grüner Kreis", "a red ring\u2028on two lines", "圆"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_encodings_and_line_ends_are_stripped(tmp_path, encoding, end):
    text = f"{end}  {CAPTIONS[0]} {end}{end}\t{end}{CAPTIONS[1]}{end}{CAPTIONS[2]}"
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / "x.txt").write_bytes((mark + text).encode(encoding))
    assert read_prompts(str(tmp_path / "x.txt")) == CAPTIONS


def test_joined_files_with_marks_are_read(tmp_path):
    (tmp_path / "x.txt").write_bytes("a\n".encode("utf-8-sig") * 2)
    assert read_prompts(str(tmp_path / "x.txt")) == ["a", "a"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a\nb\r\n\xe4\n", r"x\.txt', line 3: not readable as UTF-8 \(.*\): save the file as UTF-8"),
        ("a\nbc".encode("utf-16-le"), r"x\.txt', line 1: not readable as UTF-8 \(it has a NUL character"),
        (b"\n \r\n", r"file '.*x\.txt' holds no caption, expected one per line"),
        (b"", r"x\.txt' cannot be read: the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"x\.txt': a Git LFS pointer"),
    ],
)
def test_errors_name_file_and_line(tmp_path, content, says):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"^--prompts: .*{says}"):
        read_prompts(str(tmp_path / "x.txt"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_json_have_negative_prompts(tmp_path, encoding, end):
    lines = ['{"prompt": "圆", "negative_prompt": "blurred"}', "", '{"prompt": "a"}', '{"prompt": ""} ']
    (tmp_path / "x.jsonl").write_bytes(end.join(lines).encode(encoding))
    assert read_prompt_file(str(tmp_path / "x.jsonl")) == [Prompt("圆", "blurred"), Prompt("a"), Prompt("")]
    (tmp_path / "x.txt").write_bytes(end.join(lines).encode(encoding))
    assert read_prompt_file(str(tmp_path / "x.txt"))[0] == Prompt(lines[0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "a"}\n{"prompt": ', r"line 2: Expecting value, expected a JSON object"),
        ('{"prompt": "a"}\n\n"a"', r"line 3: got \"a\", expected {\"prompt\": "),
        ('{"text": "a"}', r'line 1: got {"text": "a"}, expected {"prompt"'),
        ('{"prompt": "a", "negative_prompt": 3}', r"line 1: got .* 3}, expected"),
        ("\n \n", r"file '.*' holds no caption"),
    ],
)
def test_errors_in_lines_of_json_name_file_and_line(tmp_path, content, says):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"^--prompts: .*{says}"):
        read_prompt_file(str(tmp_path / "x.jsonl"))


def test_only_clip_towers_have_chunks():
    with pytest.raises(ValueError, match="--long-prompts: the conditioner is ClassLabel, expected one with"):
        read_in_chunks(ClassLabel(3))
