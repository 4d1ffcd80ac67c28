# Everything a person or CI does here. `make help` lists it.
# Needs Python 3.11 or newer with its venv module, and git for some tests; all else goes into .venv.

WORKDIR ?= work
# More arguments for pip. On a machine without a GPU, `PIP_ARGS="--extra-index-url URL"` with the index of PyTorch's
# CPU wheels saves gigabytes.
PIP_ARGS ?=
# The interpreter that .venv is made with; empty looks for one.
PYTHON ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt $(PIP_ARGS)
# Hardly a test has use for two cores, so files of tests share them out, each on one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
MANIFESTS := pyproject.toml constraints.txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DEEPSPEED := $(VENV)/.installed-deepspeed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo install install-dev deepspeed test test-slow test-zero lint format chart-readme wheel clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## Distil the bundled teacher here, into WORKDIR (default: work)
	$(BIN)/teefusion run --workdir "$(WORKDIR)"

install: $(INSTALLED)  ## Make .venv with what running needs

install-dev: $(INSTALLED_DEV)  ## Make .venv with the tools of developers too

deepspeed: $(INSTALLED_DEEPSPEED)  ## Add DeepSpeed to .venv; on CPU it takes a C++ compiler to run

test: $(INSTALLED_DEV)  ## Run the tests that take seconds
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED_DEV)  ## Run the tests that take minutes
	$(PYTEST) -m slow

test-zero: $(INSTALLED_DEV) $(INSTALLED_DEEPSPEED)  ## Run the tests of DeepSpeed ZeRO; they take a C++ compiler
	$(BIN)/python -m pytest -m slow tests/test_zero.py

lint: $(INSTALLED_DEV)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED_DEV)  ## Put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chart-readme: $(INSTALLED_DEV)  ## Write the chart's README.md from its values.yaml
	$(BIN)/python charts/readme.py

wheel: $(INSTALLED_DEV)  ## Build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## Remove what the targets above made, except WORKDIR
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last when an environment is made, so an interrupted one is taken up again.
$(BIN)/pip:
	@named="$(PYTHON)"; \
	for candidate in $${named:-python3.11 python3 python3.12 python3.13}; do \
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Making $(VENV) with $$candidate ($$("$$candidate" --version))"; \
	        exec "$$candidate" -m venv $(VENV); \
	    fi; \
	done; \
	echo "Found no Python 3.11 or newer with its venv module$${named:+ at $$named}. Install it" \
	    "(Debian, Ubuntu: apt-get install python3 python3-venv), or name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(INSTALLED): $(MANIFESTS) | $(BIN)/pip
	$(PIP_INSTALL) --editable ".[pipeline,train,serve]"
	@touch $@

$(INSTALLED_DEV): $(MANIFESTS) | $(BIN)/pip
	$(PIP_INSTALL) --editable ".[pipeline,train,serve,dev]"
	@touch $@ $(INSTALLED)

# Without isolation its build sees the installed torch. No kernel is compiled now: they are when first used.
$(INSTALLED_DEEPSPEED): $(INSTALLED)
	$(PIP_INSTALL) setuptools wheel
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation --editable ".[deepspeed]"
	@touch $@
