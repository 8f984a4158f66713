# Everything runs from .venv, which is built once from requirements.lock, every file checked against its sha256.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cksum < requirements.lock | tr ' ' '-')

export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help setup repro test test-fast faults bench verify lint audit format ui lock clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## the environment in .venv, from the lock (a minute or two, once)

# pip checks and installs uv alone, out of the same lock; uv installs the rest in parallel. Bytecode is compiled here, so that
# every start is a quick one, also where Python is told not to write any.
$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 setup" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/^    #/p' requirements.lock > $(VENV)/uv.lock
	@echo "installing the locked packages into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/uv.lock
	@UV_HTTP_TIMEOUT=300 $(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@# A folder without git (an unpacked archive) is a DVC project as well.
	@git rev-parse --is-inside-work-tree > /dev/null 2>&1 || test ! -d .dvc || $(BIN)/dvc config --local core.no_scm true
	@rm -f $(VENV)/.ready-* && touch $@

repro: setup  ## the whole pipeline on the sample profile: download, preprocess, train, evaluate, export
	dvc repro
	@dvc metrics show

# Each worker on one core; the pipeline's trainings want both for themselves.
test: setup  ## all tests but those marked long; last, the real pipeline in a clean clone
	OMP_NUM_THREADS=1 python -m pytest -m "not pipeline and not long" -n 2 --dist loadfile --no-loadscope-reorder
	python -m pytest -m pipeline
test-fast: setup  ## the tests that neither train nor start servers
	python -m pytest -m "not slow and not pipeline"

faults: setup  ## the whole fault matrix of docs/reliability.md, also what takes minutes
	python -m pytest -m "faults or long"

bench: setup  ## speed and memory against their targets, about five minutes; see python -m benchmarks --help
	python -m benchmarks

verify: setup  ## reproducibility, claim by claim, a quarter of an hour; see python -m verification --help
	python -m verification --pipeline

lint: setup  ## ruff and mypy
	ruff check
	ruff format --check
	mypy

# Asks a service for what is known by now, so it needs the network. pip-audit in an environment of its own: uv audits uv.lock only.
audit: setup  ## the locked packages against the known vulnerabilities
	uvx pip-audit==2.10.1 --strict --disable-pip --require-hashes -r requirements.lock

format: setup  ## what ruff mends by itself
	ruff check --fix
	ruff format

UI_PORT ?= 5000
ui: setup  ## MLflow's pages on http://127.0.0.1:5000, for this machine alone
	mlflow ui --host 127.0.0.1 --port $(UI_PORT) --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/experiments/mlflow.db}"

lock: setup  ## pins anew what pyproject.toml allows, into requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --group dev --extra cluster --no-header pyproject.toml -o requirements.lock

clean:  ## removes what runs made outside DVC's outputs: direct runs, their data, unfinished work
	rm -rf experiments/runs experiments/.work data/direct data/.partial
