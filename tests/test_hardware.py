"""Native precisions of this processor, and torch's answer when its instructions are hidden."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm import hardware
from ldm.hardware import (
    choose_precision,
    computes,
    decoding_workers,
    device_of,
    explaining_memory,
    inference,
    slowdown,
    warn_of_emulation,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[1]
HIDDEN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Makes of any x86 processor one without bfloat16, as far as torch is concerned."""
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="hides instructions of x86 processors")


@x86
@pytest.mark.skipif(any(name in os.environ for name in HIDDEN), reason="instructions are hidden from torch")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux what the processor has")
def test_torch_and_linux_agree_on_bfloat16():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    native = bool(flags & {"avx512_bf16", "amx_bf16"})
    assert computes(torch.bfloat16, CPU) == native
    assert choose_precision(CPU) == ("bf16-mixed" if native else "32-true")


@pytest.mark.slow
@pytest.mark.versions
@x86
def test_a_processor_without_bfloat16_is_recognised_and_its_slowdown_measured():
    code = (
        "import torch; from ldm.hardware import *; cpu = torch.device('cpu');"
        "print(computes(torch.bfloat16, cpu), choose_precision(cpu));"
        "print(warn_of_emulation('trainer.precision', 'bf16-mixed', cpu))"
    )
    environment = {**os.environ, **HIDDEN}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250)
    precision, warning = done.stdout.splitlines()
    assert precision == "False 32-true", done.stderr
    expected = (
        r"warning: trainer.precision: bf16-mixed, but this cpu only emulates bfloat16: matrix products take "
        r"([\d.e+]+) times as long as in float32 \(just measured\); 32-true is what it computes natively"
    )
    assert float(re.fullmatch(expected, warning)[1]) > 0
    assert len(warning) < 300


def test_native_bfloat16_needs_no_warning():
    assert computes(torch.float32, CPU) and computes(torch.float64, CPU)
    for precision in ("32-true", "64-true", choose_precision(CPU)):
        assert warn_of_emulation("trainer.precision", precision, CPU) is None
    assert slowdown(torch.float32, CPU, size=8) > 0


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_that_emulates_bfloat16_does_not_count(monkeypatch, native, precision):
    """A V100 reports bfloat16 support without including_emulation=False."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert computes(torch.bfloat16, CUDA) is native and computes(torch.float16, CUDA)
    assert choose_precision(CUDA) == precision


def test_the_device_is_the_one_that_lightning_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_of(name).type for name in ("auto", "gpu", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [device_of(name).type for name in ("auto", "mps", "cpu")] == ["mps", "mps", "cpu"]
    assert choose_precision(torch.device("mps")) == "32-true"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_of("auto").type == "cpu"


def test_what_is_not_trained_computes_in_float32_on_a_cpu_unless_asked_for():
    x = torch.ones(2, 2)
    for wanted, dtype in (("auto", torch.float32), ("32", torch.float32), ("bf16", torch.bfloat16)):
        with inference(wanted, CPU):
            assert (x @ x).dtype == dtype


def test_decoding_workers_are_the_cores_of_a_gpu_s_process_as_far_as_their_batches_fit(monkeypatch):
    assert decoding_workers(CPU, 1) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    usage = hardware.shutil._ntuple_diskusage(0, 0, 1000)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: usage)
    assert decoding_workers(CUDA, 10) == 16
    assert decoding_workers(CUDA, 100) == 4  # batches: two of each worker, and the one in use
    assert decoding_workers(CUDA, 5000) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert decoding_workers(CUDA, 10) == 2


def test_memory_that_is_used_up_is_one_line_with_what_helps():
    """On a CPU really; a GPU's error is torch's class with the text that its allocator writes."""
    with (
        pytest.raises(
            ValueError, match=r"out of memory: the CPU was asked for 931322.57 GiB, .* GiB are free"
        ),
        explaining_memory("a smaller --batch-size"),
    ):
        torch.empty(10**15, dtype=torch.uint8)
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.10 GiB of which "
        "1.05 GiB is free. Including non-PyTorch memory, this process has 78.05 GiB memory in use."
    )
    expected = (
        "out of memory: GPU 1 was asked for 2.00 GiB, 1.05 GiB of 79.10 GiB are free; what helps: a, or b"
    )
    with pytest.raises(ValueError) as found, explaining_memory("a", "b"):
        raise torch.OutOfMemoryError(text)
    assert str(found.value) == expected
    with pytest.raises(RuntimeError, match="another"), explaining_memory("a"):
        raise RuntimeError("another")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize("wanted", [None, "1000000"])
def test_freed_memory_stays_with_the_process_unless_the_environment_says_otherwise(wanted):
    # four tensors of 24 MiB, freed together: 24,576 pages of 4 KiB a round if they go back to the system
    program = """
import resource, torch
from ldm.hardware import keep_freed_memory
keep_freed_memory(torch.device("cpu"))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(6 * 2**20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(10)][-1])
"""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {} if wanted is None else dict.fromkeys(names, wanted)
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (int(ran.stdout) < 100) == (wanted is None), ran.stdout
