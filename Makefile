# What to type. `make help` lists it.

PYTHON ?= python3
PORT ?= 5000
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
# DVC asks for a name; a container's user may have none, and no home for uv's cache.
export LOGNAME ?= $(firstword $(shell id -un 2>/dev/null; id -u))

.DEFAULT_GOAL := help
.PHONY: help install repro recipe plan test lint flow serve ui lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: .venv/installed  ## install everything, pinned and with hashes, into .venv

.venv/installed: requirements.txt requirements-uv.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 15) or sys.exit("Python 3.11 to 3.14 is needed, this is %d.%d: make PYTHON=python3.14 ..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.txt
	$(BIN)/uv $(shell test -w "$$HOME" || echo --no-cache) pip install --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.txt
	touch $@

repro: .venv/installed  ## run the whole pipeline: images in, a registered student out
	@$(BIN)/python -m pipeline.core.running.preflight
	@! grep -q '^  labelled_root: data/digits ' params.yaml || \
	  echo "The embedded example takes 6 to 12 minutes on two CPU cores the first time; stages that are up to date take none."
	$(BIN)/dvc --wait-for-lock repro
	$(BIN)/python -m pipeline.register --if-missing
	@echo "Done. The report: data/evaluate/report.html. The registry: make ui. Top-1: $(BIN)/dvc metrics show"

recipe: .venv/installed  ## set params.yaml to a recipe: RECIPE=cifar10; without one, list them
	@$(BIN)/python -m pipeline.recipes $(if $(RECIPE),apply $(RECIPE))

plan: .venv/installed  ## say what a recipe would cost, without running it: RECIPE=imagenet_ssld
	@$(BIN)/python -m pipeline.plan $(or $(RECIPE),digits)

test: .venv/installed  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: .venv/installed  ## check the code's style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

flow: .venv/installed  ## run the pipeline as a Prefect flow, here and now
	$(BIN)/python -m pipeline.flow

serve: .venv/installed  ## start Prefect's server and the deployment ssld/local, on this machine alone
	$(BIN)/python -m pipeline.flow serve

ui: .venv/installed  ## show the model registry's pages on http://127.0.0.1:5000; PORT=5001 for another
	@$(BIN)/python -m pipeline.core.running.mlflow_pages --port $(PORT)

lock: .venv/installed  ## bring requirements*.txt up to requirements*.in; pins that still fit stay
	for name in requirements requirements-uv; do \
	  $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	    --python-version 3.11 $$name.in -o $$name.txt || exit 1; done

clean:  ## remove checkpoints, workspaces, Prefect's history, labels set aside, last scores, prepare's notes; results stay
	[ ! -d .scratch ] || find .scratch -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} +
