# Everything runs from .venv, installed from a lock file; every package is checked against its sha256. There are two locks:
# requirements.lock for running, requirements-dev.lock for testing as well (the same versions and more packages).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cksum < requirements.lock | tr ' ' '-')
READY_DEV := $(VENV)/.ready-dev-$(shell cksum < requirements-dev.lock | tr ' ' '-')

export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev repro test test-fast faults bench verify lint audit format ui lock clean

help:  ## the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A .venv that holds the larger set keeps it.
setup: $(if $(wildcard $(VENV)/.ready-dev-*),$(READY_DEV),$(READY))  ## .venv with what running needs (a minute or two, once)

setup-dev: $(READY_DEV)  ## .venv with what testing and several machines need as well

$(READY): LOCK := requirements.lock
$(READY_DEV): LOCK := requirements-dev.lock

# pip installs uv alone, out of the same lock; uv installs the other packages in parallel. Bytecode is compiled here, so that
# every start is quick, also where Python may not write any.
$(READY) $(READY_DEV):
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 setup" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/^    #/p' $(LOCK) > $(VENV)/uv.lock
	@echo "installing $(LOCK) into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/uv.lock
	@UV_HTTP_TIMEOUT=300 $(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes $(LOCK)
	@# A folder without git (an unpacked archive) is a DVC project as well.
	@git rev-parse --is-inside-work-tree > /dev/null 2>&1 || test ! -d .dvc || $(BIN)/dvc config --local core.no_scm true
	@rm -f $(VENV)/.ready-* && touch $@

repro: setup  ## the whole pipeline on the sample profile: download, preprocess, train, evaluate, export
	dvc repro
	@python -m src.summary

# One worker a core, one thread a worker. The pipeline's trainings run last, alone: they use all cores.
test: setup-dev  ## all tests but those marked long; last, the real pipeline in a clean clone
	OMP_NUM_THREADS=1 python -m pytest -m "not pipeline and not long" -n logical --dist loadfile --no-loadscope-reorder
	python -m pytest -m pipeline

test-fast: setup-dev  ## the tests that neither train nor start servers
	OMP_NUM_THREADS=1 python -m pytest -m "not slow and not pipeline" -n logical --dist loadfile

faults: setup-dev  ## the complete fault matrix of docs/reliability.md, including what takes minutes
	python -m pytest -m "faults or long"

bench: setup  ## speed and memory against their targets, about five minutes; see python -m benchmarks --help
	python -m benchmarks

verify: setup  ## reproducibility, claim by claim, a quarter of an hour; see python -m verification --help
	python -m verification --pipeline

lint: setup-dev  ## ruff and mypy
	ruff check
	ruff format --check
	mypy

# Needs the network: it asks a service for the vulnerabilities known today. uv's own audit reads uv.lock only.
audit: setup  ## the locked packages against the known vulnerabilities
	uvx pip-audit==2.10.1 --strict --disable-pip --require-hashes -r requirements-dev.lock

format: setup-dev  ## what ruff fixes by itself
	ruff check --fix
	ruff format

UI_PORT ?= 5000
ui: setup  ## MLflow's pages on http://127.0.0.1:5000, for this machine alone
	@python -m src.ui --port $(UI_PORT)

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml
lock: setup  ## both locks anew from pyproject.toml; versions that still fit are kept
	$(COMPILE) --group setup -o requirements.lock
	$(COMPILE) --group dev --extra cluster --extra pretrained --constraint requirements.lock -o requirements-dev.lock

clean:  ## removes what runs made outside DVC's outputs: direct runs, their data, unfinished work; sends unsent records first
	@if [ -z "$(FORCE)" ] && find experiments/.work -name '*.jsonl' 2> /dev/null | grep -q .; then \
		python -m src.sync || { echo "make clean: nothing is removed: it would lose what MLflow has not got; FORCE=1 removes it"; exit 1; }; fi
	rm -rf experiments/runs experiments/.work data/direct data/.partial
