# Each target makes .venv itself and installs what it needs; again only when pyproject.toml changed.
PYTHON ?= python3
PY := .venv/bin/python
# Every benchmark is a command that prints one table; the demo has a target of its own.
BENCHMARKS := $(filter-out __init__ demo,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: help venv demo test check bench
.NOTPARALLEL:
.PRECIOUS: .venv/.ready-%

help:
	@echo "make demo   train autoencoder, CLIP and diffusion on embedded data, draw unseen captions"
	@echo "make test   all tests"
	@echo "make check  linters, types, import contracts"
	@echo "make bench  all benchmarks, one table each"
	@echo "make venv   only install"

venv: .venv/.ready-test .venv/.ready-check

demo: .venv/.ready-digits
	$(PY) -m benchmarks.demo

test: .venv/.ready-test
	$(PY) -m pytest

check: .venv/.ready-check
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	.venv/bin/lint-imports

bench: .venv/.ready-test
	set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) -m benchmarks.$$name; done

# Asks for pip, not for the folder: an interrupted first try leaves a .venv without it.
.venv/.ready-%: pyproject.toml
	@echo "Installing ldm[$*] into .venv; minutes the first time, torch is large"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -e '.[$*]'
	@touch $@
