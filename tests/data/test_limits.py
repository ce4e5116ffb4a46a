"""Limits of machines: open files, shared memory, connections, read-only folders."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest
import torch
from tiny_shards import png, sample, write_shards, write_tar

from ldm import hardware
from ldm.cli import run_command
from ldm.data import streaming
from ldm.data.index import load_index, sidecar, summarize
from ldm.data.module import Indexed, Streaming
from ldm.data.source import DataRank, SampleSpec
from ldm.evaluation.reference import open_shards
from ldm.latents.encode import ShardEncoder, encode_shards
from ldm.nets.autoencoder import KLAutoencoder

SPEC = SampleSpec(("image", "text"), 8, 5)


@pytest.fixture
def few_files():
    """Leave a hundred further files that may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_batch_from_a_worker_costs_few_open_files(tmp_path, few_files):
    layout = json.dumps({"layout": [{"label": 1, "box": [0, 0, 1, 1]}]}).encode()
    files = [
        (f"{n:03d}.{kind}", body) for n in range(400) for kind, body in (("png", png(n)), ("json", layout))
    ]
    path = str(write_tar(tmp_path / "a.tar", files))
    source = Indexed().open(path, SampleSpec(("image", "layout"), 8, 0))
    batch = next(iter(source.loader(lambda: 0, 400, 1, DataRank(0, 1))))
    assert [rows.tolist() for rows in batch["layout"]] == [[[1, 0, 0, 1, 1]]] * 400
    net = KLAutoencoder(latent_channels=1, block_out_channels=[4], layers_per_block=1, norm_groups=2)
    encoder = ShardEncoder(net, torch.device("cpu"), 8, 400, 1, False)
    made_by = {"autoencoder": {"sha256": "0", "checkpoint": "x"}, "image_size": 8, "keep_images": False}
    assert encode_shards(encoder, [path], tmp_path / "out", made_by) == (400, 0)


def test_workers_need_room_in_shared_memory(tmp_path):
    source = Indexed().open(write_shards(tmp_path, [4]), SPEC)
    message = r"data.num_workers: 2 workers need .* MB in /dev/shm, which has .* of .* MB free .*--shm-size"
    with pytest.raises(ValueError, match=message):
        source.loader(lambda: 0, 10**12, 2, DataRank(0, 1))
    with pytest.raises(ValueError, match=message):
        Streaming().open(write_shards(tmp_path, [4]), SPEC).loader(lambda: 0, 10**12, 2, DataRank(0, 1))
    source.loader(lambda: 0, 10**12, 0, DataRank(0, 1))


def test_the_processes_of_a_node_share_its_memory():
    usage = shutil.disk_usage(hardware.SHARED_MEMORY)
    batch = min(usage.free, usage.total // 5) // 3
    hardware.check_shared_memory("data.num_workers", 1, batch)
    hardware.check_shared_memory("data.num_workers", 1, batch, 2)
    with pytest.raises(ValueError, match=r"1 workers of each of 9 processes need .* MB in /dev/shm"):
        hardware.check_shared_memory("data.num_workers", 1, usage.total // 25, 9)


SMALL = "mount -t tmpfs -o size=1m tmpfs /dev/shm"


@pytest.mark.slow
def test_a_small_shared_memory_is_named_before_workers_start(tmp_path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", SMALL]).returncode:
        pytest.skip("nothing may be mounted here")
    train, val = write_shards(tmp_path, [8]), write_shards(tmp_path, [2], "val")
    program = (
        "import sys; from ldm.cli import run_command; from ldm.data.module import Shards; "
        f"data = Shards({train!r}, {val!r}, image_size=256, batch_size=8, num_workers=2); "
        "sys.exit(run_command(data.train_dataloader))"
    )
    command = ["unshare", "-m", "sh", "-c", f'{SMALL}; exec "$@"', "sh", sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr.startswith(
        "error: data.num_workers: 2 workers need 7.9 MB in /dev/shm, which has 1.0 of 1.0 MB free"
    )


@pytest.mark.parametrize("index_dir", [None, "own"])
def test_the_index_of_a_read_only_shard_lies_in_the_cache(tmp_path, monkeypatch, index_dir):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = str(write_tar(tmp_path / "data" / "a.tar", [*sample(0), *sample(1)]))
    (sidecar(path, None) / "taken").mkdir(parents=True)  # root may write anywhere
    folder = index_dir and str(tmp_path / index_dir)
    assert (summarize(path, folder).count, load_index(path, folder).key(1)) == (2, "000001")
    assert len(list((tmp_path / (index_dir or "cache/ldm/indices")).glob("a-*.index.npz"))) == 1
    write_tar(tmp_path / "data" / "a.tar", sample(7))
    assert load_index(path, folder).key(0) == "000007"
    assert open_shards(path, 8)[0]["text"] == "number 7"


class Breaking(SimpleHTTPRequestHandler):
    """Serves a folder, and closes the first ``breaks`` connections between two members."""

    breaks = 0
    served = 0

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        content = source.read()
        type(self).served += 1
        between = max(content.find(b"000006.png"), content.find(b"000018.png"))  # two members
        outputfile.write(content[:between] if self.served <= self.breaks else content)


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WAITS", (0.0, 0.0))
    write_shards(tmp_path, [12, 12])
    handler = type("Handler", (Breaking,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}/train-{{000000..000001}}.tar"
        server.shutdown()


def keys_of(pattern: str) -> list[str]:
    loader = Streaming(1).open(pattern, SPEC).loader(lambda: 0, 4, 0, DataRank(0, 1))
    return [key for batch in islice(loader, 6) for key in batch["key"]]


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset opens URLs with curl")
def test_a_connection_that_breaks_is_taken_up_where_it_broke(served):
    handler, pattern = served
    expected = keys_of(pattern)
    assert sorted(expected) == [f"{n:06d}" for n in range(24)]
    handler.breaks = handler.served + 2
    assert keys_of(pattern) == expected


@pytest.mark.skipif(not shutil.which("curl"), reason="webdataset opens URLs with curl")
def test_a_broken_connection_suggests_a_retry_and_a_missing_page_does_not(served, capsys):
    handler, pattern = served
    handler.breaks = 10**9
    assert run_command(lambda: print(keys_of(pattern))) == 75
    assert "the connection broke 3 times (curl ended with code 18)" in capsys.readouterr().err
    assert run_command(lambda: print(keys_of(pattern.replace("train", "trian")))) == 2
    assert "cannot be read as a tar (curl ended with code 22)" in capsys.readouterr().err


def test_a_program_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert run_command(lambda: print(keys_of("http://127.0.0.1:9/a.tar"))) == 2
    assert "No such file or directory: 'curl'" in capsys.readouterr().err
