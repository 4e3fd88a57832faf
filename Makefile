# `make pretrain` runs the main job on the embedded corpus, `make test` every test that this machine can run, `make check`
# lint, types and the tests that start no process. All first build an environment in .venv.
# ARGS adds config overrides: make pretrain ARGS="arm=token_drop run.seed=2"

PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS ?= constraints.txt
RUNS ?= runs
ARGS ?=
TESTS ?=
# One more than there are cores: tests of jobs and launchers wait for most of their time.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

# Called again, `make pretrain` continues the run that is there.
RESUME = $(if $(wildcard $(RUNS)/demo/config.yaml),--resume)

.PHONY: pretrain check test bench lint clean
.DELETE_ON_ERROR:

# torch goes first: building DeepSpeed looks for it. DS_BUILD_OPS=0: no op is compiled ahead of time. seqeval asks for
# setuptools_scm as it is built.
.venv/ready: setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) torch setuptools setuptools_scm wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-build-isolation -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

pretrain: .venv/ready
	$(BIN)/sctd prepare --source embedded --vocab-size 4096 --seq-len 128 --valid-fraction 0.05 --out $(RUNS)/demo-corpus
	$(BIN)/sctd pretrain demo data.corpus=$(RUNS)/demo-corpus run.dir=$(RUNS)/demo $(RESUME) $(ARGS)

test: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

check: lint
	$(BIN)/python -m pytest -q -n auto -m "not run" --no-header -r fE $(TESTS)

bench: .venv/ready
	$(BIN)/sctd bench bert-base-sctd model.attention_dropout=0 --out benchmarks/results $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
