# Each target makes .venv itself and installs what it needs; again only when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
PY := .venv/bin/python
# Several tests at once: tests/conftest.py says how many, and which of them one after the other.
PYTEST := -m pytest -n auto --no-loadscope-reorder
# Every benchmark is a command that prints one table; the demo has a target of its own.
BENCHMARKS := kills growth $(filter-out __init__ demo,$(basename $(notdir $(wildcard benchmarks/*.py))))
# Folders of tests that compute with no network: on any processor the same.
SAME := benchmarks comparison data_sets inspection io loggers network runs slurm

.PHONY: help venv demo test test-fast test-float32 test-versions check bench constraints
.NOTPARALLEL:
.PRECIOUS: .venv/.ready-% .venv-%/.ready

help:
	@echo "make demo           train autoencoder, CLIP and diffusion on embedded data, draw unseen captions"
	@echo "make test           all tests"
	@echo "make test-fast      all but the slow ones: three to four minutes on two cores"
	@echo "make test-float32   the fast tests that compute, as on a processor without AVX-512 and bfloat16"
	@echo "make test-versions  the fast tests in .venv-lowest and .venv-newest: lowest and newest versions that pyproject.toml allows"
	@echo "make check          linters, types, import contracts"
	@echo "make bench          all benchmarks, one table each"
	@echo "make venv           only install"
	@echo "make constraints    add new dependencies to constraints.txt, or upgrade all with UPGRADE=--upgrade"

venv: .venv/.ready-test .venv/.ready-check

demo: .venv/.ready-digits
	$(PY) -m benchmarks.demo

test: .venv/.ready-test
	$(PY) $(PYTEST)

test-fast: .venv/.ready-test
	$(PY) $(PYTEST) -m "not slow"

test-float32: .venv/.ready-test
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PY) $(PYTEST) -m "not slow" $(addprefix --ignore=tests/,$(SAME))

test-versions: .venv-lowest/.ready .venv-newest/.ready
	.venv-lowest/bin/python $(PYTEST) -m "not slow or versions"
	.venv-newest/bin/python $(PYTEST) -m "not slow or versions"

check: .venv/.ready-check
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	.venv/bin/lint-imports

bench: .venv/.ready-test
	set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) -m benchmarks.$$name; done

# One file for every Python and system: uv resolves for all of them, and keeps what the file already says.
constraints: .venv/.ready-check
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
	  --custom-compile-command "make constraints" $(UPGRADE) --output-file constraints.txt pyproject.toml

# Asks for pip, not for the folder: an interrupted first try leaves a .venv without it.
.venv/.ready-%: pyproject.toml constraints.txt
	@echo "Installing ldm[$*] into .venv; minutes the first time, torch is large"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt -e '.[$*]'
	@touch $@

.venv-lowest/.ready: RESOLUTION := lowest-direct
.venv-newest/.ready: RESOLUTION := highest
.venv-%/.ready: pyproject.toml .venv/.ready-check
	@echo "Installing the $* versions into .venv-$*; minutes the first time"
	$(PYTHON) -m venv --clear .venv-$*
	.venv/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION) -e '.[test]'
	@touch $@
