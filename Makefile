# Two commands do everything on a machine with Python 3.11 to 3.13, pip and make:
#   make demo    sets up what a user needs and runs the demo
#   make test    sets up what a developer needs and runs every check
# Both may be repeated; what is installed stays until pyproject.toml or constraints.txt changes.

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
BENCHMARKS ?= steps peers growth memory decoding scale
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python)
COMMA := ,
PINNED := -c constraints.txt
# A Python that understudy runs on and that can make an environment with pip in it.
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
READY := import sys, pip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types format bench clean
.NOTPARALLEL:

help: ## list these commands
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/.core ## set up, then distil a digit classifier and show the report
	@$(BIN)/understudy demo

test: $(VENV)/.dev lint types ## set up, then lint, type check and run every test
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(VENV)/.dev lint types ## the same without the slow tests, in under 3 minutes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

lint: $(VENV)/.dev
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.dev
	@$(BIN)/mypy

format: $(VENV)/.dev ## format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/.peers ## install the libraries to compare with, then run the benchmarks: 25 to 40 minutes
	@for name in $(BENCHMARKS); do echo "benchmarks/$$name.py"; $(BIN)/python "benchmarks/$$name.py" || exit; done

clean: ## remove the environment and all caches; runs are kept
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# --- set-up ----------------------------------------------------------------------------------------------------------

# uv installs in seconds what pip installs in minutes; where uv cannot be had or finds no packages, pip does the work.
define install
	@echo "Installing $(2) into $(VENV) (the first time: minutes, and up to 6 GB for torch)"
	@$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install -q --disable-pip-version-check $(PINNED) uv || true
	@$(BIN)/uv pip install -q --python $(BIN)/python $(PINNED) -e '$(1)' || { \
	  echo "uv could not install it; pip tries, which takes longer"; \
	  $(BIN)/python -m pip install -q --disable-pip-version-check $(PINNED) -e '$(1)'; }
endef

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/.made
	$(call install,.,understudy)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	$(call install,.[dev],understudy and the tools of its developers)
	@touch $(VENV)/.core $@

$(VENV)/.peers: pyproject.toml constraints.txt | $(VENV)/.dev
	$(call install,.[dev$(COMMA)peers],the libraries that the benchmarks compare with)
	@touch $@

$(VENV)/.made:
	@$(BIN)/python -c '$(READY)' 2>/dev/null || { \
	  for python in $(CANDIDATES) none; do $$python -c '$(SUITABLE)' 2>/dev/null && break; done; \
	  if [ $$python = none ]; then \
	    echo "understudy needs Python 3.11, 3.12 or 3.13 with venv and pip; none of these is one: $(CANDIDATES)." \
	      "Install one, or name it: make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$python --version)"; \
	  $$python -m venv --clear $(VENV); }
	@touch $@
