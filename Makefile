PYTHON ?= python3
# Installed first, alone, and only where the environment has no torch yet: with CUDA on Linux.
# docs/install.md has what to say here for the build without CUDA, which is a tenth of its size.
TORCH ?= torch==2.13.0
# Of the suite, for two cores: the tests of SLURM and of Ray mostly wait.
WORKERS ?= 3
# The demo and the tests run on any machine: two ranks cannot share its one GPU.
demo test long compat release: export SEGFLEET_DEVICE ?= cpu
VENV := .venv
PY := $(VENV)/bin/python
SEG := $(VENV)/bin/segfleet
SHELL := /bin/bash
export PYTHONUTF8 := 1
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
.PHONY: sources demo test install system lint long compat release clean-demo

$(VENV)/ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("segfleet needs Python 3.11 or newer; try make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	if ! $(PY) -c 'import torch' 2>/dev/null; then
	  echo "installing $(TORCH): gigabytes, if it is the build with CUDA (docs/install.md: the small one)"
	  $(PIP) -c constraints.txt $(TORCH)
	fi
	$(PIP) -c constraints.txt -e .
	touch $@

install: $(VENV)/ready

# What only the tests need. dynamic-network-architectures is the yardstick of parameter counts; its own requirements would replace torch.
$(VENV)/tests-ready: $(VENV)/ready
	$(PIP) setuptools wheel
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps -c constraints.txt dynamic-network-architectures
	touch $@

# A real SLURM for the tests of submitted jobs, and a browser for the report's test, where we may install them.
system:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } >/dev/null; then
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null || echo "SLURM could not be installed: its tests will be skipped, and fail where CI is set"
	fi
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null || echo "chromium could not be installed: the browser test will be skipped"
	fi

# Compiled tests are kept, whatever the shell says: every worker and every cold process reads them.
test long: export PYTHONDONTWRITEBYTECODE :=

# In the order of the folders, not the files with most tests first: the longest, of SLURM, have few.
test: $(VENV)/tests-ready system
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Outcome and seconds of each go to benchmarks/results/long.json. Some only: make long LONG=tests/slurm
long: $(VENV)/tests-ready system
	OMP_NUM_THREADS=1 $(PY) benchmarks/long.py $(LONG)

lint: $(VENV)/tests-ready
	$(PY) -m ruff check .
	$(PY) -m mypy

# The quick tests under the lowest and the newest versions of everything. Downloads gigabytes; which
# Pythons and packages it found, and what failed, goes to benchmarks/results/compat.json.
compat: $(VENV)/tests-ready
	$(PIP) uv
	$(PY) benchmarks/compat.py

# What is published, in dist/: built from a clean tree, resolved against the public index as a user
# would, installed and run without the checkout.
release: $(VENV)/tests-ready lint
	test -z "$$(git status --porcelain)" || { echo "commit first: a release is built from a clean tree"; exit 1; }
	$(PY) -m pytest tests/test_packaging.py -m "long or not long"
	rm -rf dist && $(PY) -m build --no-isolation

# What this version ships of the code that computes results, see pipeline/sources.py. After a change that gives the same results: SAME=1.
sources: $(VENV)/ready
	$(PY) -m segfleet.pipeline.sources $(if $(SAME),--same-results)

# Synthetic data in 3D and 2D, through every step, on two local ranks.
demo: $(VENV)/ready
	$(SEG) datasets msd phantom demo/raw/phantom3d
	$(SEG) datasets dsb2018 phantom demo/raw/phantom2d
	$(SEG) preprocess msd --raw demo/raw/phantom3d --out demo/stores/phantom3d
	$(SEG) preprocess dsb2018 --raw demo/raw/phantom2d --out demo/stores/phantom2d --format hdf5
	$(SEG) train phantom3d data.store=demo/stores/phantom3d --ranks 2 --runs demo/runs
	$(SEG) train phantom2d data.store=demo/stores/phantom2d --ranks 2 --runs demo/runs
	$(SEG) predict phantom3d demo/raw/phantom3d/imagesTr --out demo/predictions --runs demo/runs
	@echo
	@for report in $$(find demo/runs -name report.html | sort); do echo "report: $$PWD/$$report"; done

clean-demo:
	rm -rf demo
