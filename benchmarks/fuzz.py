"""Mutate tars and images and read them as training does: ``python -m benchmarks.fuzz --count 20000``.

Each case takes a small intact shard and changes it by its number: bits flip, the end is missing, fields of
headers are overwritten (with a right checksum), members get hostile names, or the image, caption, json or
latent within is damaged. It is then indexed and read by both readers and by ldm.inspect. No exception but
the ones meant may come (ValueError of a broken shard, BadSample of a bad sample), none may take longer than
--limit seconds, none may write a file outside of its folder, and what is left out is counted by reason.
Exit code 1 if a case does otherwise; it is printed with its number, for --first N --count 1.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from ldm.data.decode import BadSample, SampleId
from ldm.data.fields import FIELDS, decode_sample
from ldm.data.files import ShardFiles
from ldm.data.index import summarize
from ldm.data.tar_stream import read_samples
from ldm.data.view import View
from ldm.inspection.look import Samples

NAMES = (
    *("../../escaped.png", "/tmp/escaped.png", "a/../../b.png", "x.pkl", "x.pyd", "pipe:touch escaped.png"),
    *(
        "\0.png",
        ".png",
        "a..png",
        "a" * 300 + ".png",
        "\udcff.png",
        "a\n.png",
        "con.png",
        "$(touch escaped).png",
    ),
)
"""Names that would do harm if they were taken for paths or commands."""
VALUES = (b"\0" * 12, b"\xff" * 12, b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"9" * 12)
"""Contents of header fields."""
HEADER_FIELDS = (
    (0, 100),
    (100, 8),
    (124, 12),
    (136, 12),
    (148, 8),
    (156, 1),
    (157, 100),
    (257, 8),
    (345, 155),
)
"""Offset and length of the fields of a tar header that are overwritten."""
CHECKSUM = slice(148, 156)


class Slow(Exception):
    """A case took too long."""


@cache
def images() -> dict[str, bytes]:
    """Small images of each format, with the extras that decoders stumble over."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    found: dict[str, bytes] = {}
    exif, turned = Image.Exif(), Image.Exif()
    exif[282], exif[270], turned[274] = (72, 1), "words", 6
    note = PngImagePlugin.PngInfo()
    note.add_text("key", "value", zip=True)
    for kind, image, options in (
        ("jpg", Image.fromarray(pixels), {"format": "JPEG", "exif": exif, "icc_profile": b"x" * 40}),
        ("jpeg", Image.fromarray(pixels).convert("CMYK"), {"format": "JPEG", "progressive": True}),
        ("png", Image.fromarray(pixels), {"format": "PNG", "pnginfo": note, "exif": turned}),
        ("webp", Image.fromarray(pixels).convert("RGBA"), {"format": "WEBP", "exif": turned}),
        ("map.png", Image.fromarray(pixels).convert("P"), {"format": "PNG", "transparency": 3}),
    ):
        file = io.BytesIO()
        image.save(file, **options)
        found[kind] = file.getvalue()
    return found


@cache
def members() -> tuple[tuple[str, bytes], ...]:
    """Members of a few samples, of all fields."""
    latent = io.BytesIO()
    np.save(latent, np.ones((4, 2, 2), np.float16))
    meta = {"caption": "a", "label": 1, "captions": ["a", "b"], "width": 16, "height": 12}
    meta["layout"] = [{"label": 0, "box": [0, 0, 0.5, 1]}]
    more = [("latent.npy", latent.getvalue()), ("cls", b"3"), ("txt", "a caption \N{SNOWMAN}".encode())]
    kinds = images()
    found = [(f"{n:03d}.{kind}", kinds[kind]) for n, kind in enumerate(("jpg", "jpeg", "png", "webp"))]
    found += [("000.map.png", kinds["map.png"]), ("000.json", json.dumps(meta).encode())]
    return tuple(sorted(found + [(f"{n:03d}.{name}", body) for n in range(4) for name, body in more]))


def packed(files: Sequence[tuple[str, bytes]], form: int) -> bytes:
    """Write members to a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def flipped(content: bytes, rng: Random) -> bytes:
    """Change some bits, bytes or runs of bytes."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        position = rng.randrange(len(damaged))
        damaged[position] = rng.choice(
            (damaged[position] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256))
        )
    return bytes(damaged)


def shortened(content: bytes, rng: Random) -> bytes:
    """Leave out the end, or a piece within."""
    start = rng.randrange(len(content))
    end = len(content) if rng.random() < 0.5 else min(len(content), start + rng.randrange(1, 600))
    return content[:start] + content[end:]


def of_headers(content: bytes, rng: Random) -> bytes:
    """Overwrite a field of a header, and mend its checksum in most cases."""
    damaged = bytearray(content)
    starts = [n for n in range(0, len(content), 512) if content[n + 257 : n + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 3))):
        start = rng.choice(starts)
        offset, length = rng.choice(HEADER_FIELDS)
        value = rng.choice(
            (*VALUES, rng.randbytes(12), b"%o" % rng.randrange(1 << 33), b"LKxg"[rng.randrange(4) :])
        )
        damaged[start + offset : start + offset + length] = value.ljust(length, b"\0")[:length]
        if rng.random() < 0.8:
            header = damaged[start : start + 512]
            header[CHECKSUM] = b" " * 8
            damaged[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(damaged)


def mutated(rng: Random) -> bytes:
    """Make a tar that is not as it should be."""
    files, form = list(members()), rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    kind = rng.randrange(5)
    if kind < 2:  # within members: the tar itself is intact
        for _ in range(rng.choice((1, 3))):
            n = rng.randrange(len(files))
            name, body = files[n]
            files[n] = (name, rng.choice((flipped, shortened))(body, rng) if body else body)
        return packed(files, form)
    if kind == 2:
        for _ in range(3):
            n = rng.randrange(len(files))
            files[n] = (rng.choice(NAMES), files[n][1])
        return packed(files, tarfile.PAX_FORMAT)
    damage: Callable[[bytes, Random], bytes] = rng.choice((flipped, shortened, of_headers, of_headers))
    return damage(packed(files, form), rng)


def read_indexed(path: Path, reasons: Counter[str]) -> set[str]:
    """Look at all samples by their index, as ldm.inspect does; return their keys."""
    try:
        summary = summarize(str(path), None)
    except ValueError:
        reasons["broken shard"] += 1
        return set()
    samples = Samples(ShardFiles([summary], None), lambda captions: [len(text) for text in captions], (0,))
    looks = [samples[row] for row in range(summary.count)]
    for look in looks:
        reasons["good"] += len(look.fields)
        reasons.update(reason for reason, _ in look.bad)
    return {look.key for look in looks}


def read_streamed(content: bytes, known: set[str], reasons: Counter[str]) -> None:
    """Read all samples from front to back, and decode those that the index did not find."""
    try:
        for key, found in read_samples(io.BytesIO(content), "fuzz.tar"):
            if key not in known:
                decoded(found, SampleId("fuzz.tar", key), reasons)
    except (ValueError, tarfile.TarError):
        reasons["broken stream"] += 1


def decoded(found: dict[str, bytes], sample: SampleId, reasons: Counter[str]) -> None:
    """Decode each field of a sample; count why one cannot be used."""
    for name in FIELDS:
        try:
            decode_sample(found, sample, [name], View(8, 8, draw=5))
            reasons["good"] += 1
        except BadSample as error:
            if not error.reason.startswith("missing"):
                reasons[error.reason] += 1


def case(number: int, seed: int, folder: Path, limit: float, reasons: Counter[str]) -> Exception | None:
    """Try one case; return what should not have come."""
    content = mutated(Random(f"{seed}/{number}"))
    path = folder / "inner" / "case.tar"
    path.write_bytes(content)
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        read_streamed(content, read_indexed(path, reasons), reasons)
    except Exception as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        for left in path.parent.iterdir():
            left.unlink()
    escaped = [*folder.glob("*escaped*"), *Path("/tmp").glob("escaped*"), *Path.cwd().glob("escaped*")]
    return AssertionError(f"wrote {escaped[0]}") if escaped else None


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise Slow("it took too long")


def fuzz(first: int, count: int, seed: int, limit: float) -> tuple[Counter[str], list[tuple[int, Exception]]]:
    """Try cases; return the reasons that were counted, and cases that went wrong."""
    reasons, failed = Counter[str](), []
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(root) / "inner").mkdir()
        for number in tqdm(range(first, first + count), unit=" cases", delay=5.0, leave=False):
            error = case(number, seed, Path(root), limit, reasons)
            if error is not None:
                failed.append((number, error))
    return reasons, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="cases (default 2000)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first (default 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (default 0)")
    parser.add_argument(
        "--limit", type=float, default=10.0, metavar="S", help="seconds per case (default 10)"
    )
    given = parser.parse_args(arguments)
    reasons, failed = fuzz(given.first, given.count, given.seed, given.limit)
    for reason, times in reasons.most_common():
        print(f"{times:9,} {reason}")
    for number, error in failed[:20]:
        print(f"case {number}: {type(error).__name__}: {str(error)[:200]}")
    print(f"{given.count:,} cases, {len(failed)} went wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
