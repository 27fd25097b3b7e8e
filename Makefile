# `make help` lists what there is. Everything runs in .venv, which `make env` makes from the lock of this machine.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.PHONY: help env demo test bfcl mutants lint ui mlflow stop locks clean
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
# The first of these that is Python 3.11 to 3.13; `make env PYTHON=/path/to/python` names another.
PYTHONS := python3.11 python3.12 python3.13 python3 python

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## make or update the environment (.venv)
	@for python in $(or $(PYTHON),$(PYTHONS)); do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    exec "$$python" requirements/make_env.py; \
	  fi; \
	done; \
	echo "make env: no Python 3.11, 3.12 or 3.13 among $(or $(PYTHON),$(PYTHONS)):" \
	  "install one, or name it: make env PYTHON=/path/to/python3.11" >&2; \
	exit 1

demo: env ## turn the base model into a gated, served tool-calling model
	@$(BIN)/taskagent demo

test: env ## run the tests; make test ARGS="-m slow" runs others
	@$(BIN)/python -m pytest $(ARGS)

bfcl: env ## compare the scorer with BFCL's own checker (BFCL gets an environment of its own)
	@$(BIN)/python -m pytest -m slow taskagent_platform_tests/evaluation/test_bfcl_agreement.py $(ARGS)

# mutmut lives in an environment of its own, which sees the packages of .venv behind its own. One process, to be kind
# to the machine: it takes a while. It goes on where it was stopped; surviving_mutants.json says why those that live do no harm.
MUTMUT := $(or $(TASKAGENT_HOME),.taskagent)/cache/mutmut
mutants: env ## mutate the scorer and compare the mutants that its tests let live with the list
	@export PATH="$$PATH:$$PWD/.venv-uv/bin"; if [ ! -e $(MUTMUT)/.made ]; then \
	  command -v uv >/dev/null || { echo "make mutants: uv is missing: pip install uv" >&2; exit 1; }; \
	  uv venv --quiet --clear --python $(BIN)/python $(MUTMUT) && \
	  uv pip install --quiet --python $(MUTMUT)/bin/python mutmut==3.8.1 && \
	  $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(MUTMUT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth" && \
	  touch $(MUTMUT)/.made; \
	fi
	@OMP_NUM_THREADS=1 nice -n 19 $(MUTMUT)/bin/python -m mutmut run --max-children 1 $(ARGS)
	@$(MUTMUT)/bin/python -m mutmut results | $(BIN)/python -m taskagent_platform_tests.evaluation.surviving_mutants

lint: env ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

ui: env ## open Dagster on the demo's instance
	@$(BIN)/taskagent ui

mlflow: env ## open MLflow on the demo's runs
	@$(BIN)/taskagent mlflow

stop: ## stop the runs and servers that the project started, and only those
	@if [ -x $(BIN)/taskagent ]; then $(BIN)/taskagent stop; else echo "Nothing was started: there is no .venv yet."; fi

# The locks name no registry. Wheels for the CPU come from where `make env` takes them; such a place must not offer
# a CPU build of torch to the GPU lock. `make locks ARGS=--upgrade` takes the newest versions allowed. The extras of
# containers, Kubernetes and Ray are in both locks, so that the tests of these routes run everywhere.
COMPILE := uv pip compile pyproject.toml --quiet --no-emit-index-url --no-annotate --no-header --python-version 3.11 \
  --extra dev --extra docker --extra kubernetes --extra ray --override requirements/overrides.txt $(ARGS)
locks: ## compile requirements/*.txt from pyproject.toml (needs uv)
	@command -v uv >/dev/null || { echo "make locks: uv is missing: pip install uv" >&2; exit 1; }
	@places="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS// /,}}"; \
	if [ -n "$$places" ]; then export UV_FIND_LINKS="$$places"; else cpu="--torch-backend cpu"; fi; \
	$(COMPILE) --extra cpu --override requirements/overrides-cpu.txt $$cpu -o requirements/cpu.txt
	@env -u UV_FIND_LINKS $(COMPILE) --extra gpu --override requirements/overrides-gpu.txt \
	  --python-platform x86_64-unknown-linux-gnu -o requirements/gpu.txt

clean: ## remove caches and build outputs (not .venv, not the data)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist mutants
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
