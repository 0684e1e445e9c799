# Two commands on a fresh machine: `make train` and `make test`. All paths are relative: the repository may lie under a
# folder with a space in its name.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install train test bench lint format typecheck options clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  ARGS="..." is passed on:          make train ARGS="data=stamps seed=2"'
	@echo '  PYTHON=... chooses the Python:    make train PYTHON=python3.12'

install: .venv/.offline  ## make .venv and install the project with its offline weights

train: .venv/.offline  ## install what is missing, then run train.py $(ARGS)
	$(BIN)/python train.py $(ARGS)

# Two workers share the cores, so each has one thread. They split modules: a fixture of a module may run in both.
test: .venv/.dev  ## install what is missing, then run the test suite: pytest $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

bench: .venv/.dev  ## time this project beside Transformers: python -m benchmarks $(ARGS); takes an hour
	$(BIN)/python -m benchmarks $(ARGS)

lint: .venv/.dev  ## check style and spelling
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib .

format: .venv/.dev  ## rewrite the files as `make lint` wants them
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

typecheck: .venv/.dev  ## check the types in vlm/
	$(BIN)/python -m mypy

options: .venv/.offline  ## write docs/options.md, docs/labels.md and the tables of docs/parts.md
	$(BIN)/python -m vlm.cli.options
	$(BIN)/python -m vlm.cli.labels

clean:  ## delete caches and build leftovers; runs/ and .venv stay
	rm -rf build ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps are what makes a second run quick: pip runs again only when these files change or .venv is new.
.venv/.offline: pyproject.toml constraints.txt .venv/pyvenv.cfg
	$(PIP) -e ".[offline]"
	@touch $@

.venv/.dev: pyproject.toml constraints.txt .venv/pyvenv.cfg
	$(PIP) -e ".[offline,dev]"
	@touch .venv/.offline $@

.venv/pyvenv.cfg:
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo 'error: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), but 3.11 or newer is needed; name one: make PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	"$(PYTHON)" -m venv --clear .venv
