# The two commands: `make pretrain` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: pretrain test test-full test-long checks docs dist clean

# Two ranks, or one where there is exactly one GPU; without any the two compute on the CPU. The batch is the same.
RANKS = import torch; print(min(2, torch.cuda.device_count()) or 2)

pretrain: $(STAMP)
	ranks="$$($(BIN)/python -c '$(RANKS)')" && PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus "$$ranks" launch/pretrain.py --config launch/configs/cpu_quickstart.yaml --ds_config ds_configs/zero1.json

# Two lanes: tests that keep both cores busy one after the other, all others beside them (tests/lanes.py).
PYTEST = $(BIN)/python -m pytest -n 2

test: $(STAMP)
	$(PYTEST) -m "not full and not long"

test-full: $(STAMP)
	$(PYTEST) -m "not long"

test-long: $(STAMP)
	$(PYTEST) -m long

checks: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell *.md *.toml *.txt Makefile benchmarks docs ds_configs launch megatron_switchlora tests tools
	$(BIN)/python -m tests.english
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run examples/*.sh launch/mpi/pretrain.sh launch/slurm/pretrain.sbatch
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(MAKE) --no-print-directory docs

# The pages as a site in build/site. A link that leads nowhere is an error.
docs: $(STAMP)
	$(BIN)/python -m docs.build
	$(BIN)/zensical build --clean --strict

dist: $(STAMP)
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")'
	$(BIN)/python -m pip wheel -q --no-deps -w dist dist/*.tar.gz

# An interrupted installation leaves no stamp and is done again.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache
