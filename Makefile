# Every target makes the environment first, so each of them works on a fresh clone.
# PYTHON=/path/to/python3.12 picks another interpreter; any python3 from 3.11 on will do.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin

export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-slow test-gpu check format bench docs clean

help:
	@echo 'make demo       the five arms on the phantom, then a report (runs/demo)'
	@echo 'make test       the tests, without the slow ones'
	@echo 'make test-slow  the slow tests, and the properties on more examples'
	@echo 'make test-gpu   the tests that need an NVIDIA GPU'
	@echo 'make check      ruff and mypy --strict'
	@echo 'make format     let ruff mend what it can'
	@echo 'make bench      every benchmark, one line of JSON each'
	@echo 'make docs       the documents as a site (build/site)'
	@echo 'make .venv      only the environment'

.venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'no Python from 3.11 on was found; install one or pass PYTHON=/path/to/python3'; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: .venv/.installed
	$(BIN)/cardiomix ablate demo --run runs/demo

# One thread each: three processes share the cores, and OpenMP's threads spin while they wait for one another.
test: export OMP_NUM_THREADS := 1
test: .venv/.installed
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder -m "not slow and not gpu" --durations=10

test-slow: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "slow and not gpu" --durations=10
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "hypothesis and not gpu" --hypothesis-profile=thorough

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed
	$(BIN)/python -m benchmarks all

docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]' --constraint constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
