# make setup | demo | test | check | clean. PIP_ARGS goes to pip, for another index or CPU builds of torch:
#   make setup PIP_ARGS="--extra-index-url URL"
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=

NOTHING_IS_FINE = $(if $(strip $(PYTEST_ARGS)),|| [ $$? -eq 5 ])
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

# DeepSpeed compiles nothing at installation, so that a machine without a compiler can install it.
export DS_BUILD_OPS := 0

.PHONY: setup demo test check format clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found"; \
	  echo "fix: install Python 3.11 or newer, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1)"; \
	  echo "fix: install one and name it: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module"; \
	  echo "fix: install it, on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@# pip comes last: where it is missing, an earlier attempt was interrupted
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "setup 1/2: $(TORCH) into $(VENV) (the largest download)"
	@# torch alone first: nothing else may pull in another version of it
	$(PIP) install $(PIP_ARGS) -c constraints.txt '$(TORCH)'
	@echo "setup 2/2: the project and everything else, as constraints.txt pins it"
	$(PIP) install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(VENV)/bin/armd run demo

# The job-submission test starts a cluster of its own; in a second pytest it never meets the first one's.
# A selection in PYTEST_ARGS may leave nothing for one of them (pytest's status 5).
test: setup
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) --ignore tests/test_job_submit.py $(NOTHING_IS_FINE)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/test_job_submit.py $(NOTHING_IS_FINE)

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q -m "not ray and not slow and not gpu"

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Finished runs are kept: they are results, not build products.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
