# Each target sets up what it needs. PYTHON is only used to create the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: help venv test check demo demo-short clean

help:
	@echo "make venv | test | check | demo | demo-short | clean"

venv: $(VENV)/.dev

# torch goes first and alone: a CPU build that is already there, or that the index prefers, then stays.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH) -c constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e ".[demo]"
	touch $@

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q --durations=15

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rheo_offload csrc_free_kernels/reference csrc_free_kernels/cpu

demo: $(VENV)/.demo
	$(BIN)/rheo demo

demo-short: $(VENV)/.demo
	$(BIN)/rheo demo --short

clean:
	rm -rf $(VENV) build dist *.egg-info
