# make: check and test, as continuous integration runs them.
PYTHON ?= $(shell for python in python3.11 python3; do $$python -c '' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
DEFAULT := not slow and not gpu and not client

.DEFAULT_GOAL := all
.PHONY: all check fix test test-all test-gpu test-kt test-vllm bench docs demo clean

all: check test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

.venv: $(STAMP)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -rs tests/guards

fix: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(STAMP)
	$(BIN)/python -m pytest -rs -n 2 -m '$(DEFAULT)'

test-all: $(STAMP)
	$(BIN)/python -m pytest -rs

# On a machine with a GPU: the kernels themselves, and what only hardware can show.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -rs -k "gpu or device" tests/device tests/kernels

# kt-kernel 0.7.2 in an environment of its own: MOECONV_KT_PYTHON=/path/to/python make test-kt
test-kt: $(STAMP)
	$(BIN)/python -m pytest -s -rs -m client tests/clients/test_kt_kernel*.py

# vLLM 0.32 in an environment of its own: MOECONV_VLLM_PYTHON=/path/to/python make test-vllm
test-vllm: $(STAMP)
	$(BIN)/python -m pytest -s -rs -m client tests/clients/test_vllm.py

# With MOECONV_KT_PYTHON and MOECONV_VLLM_PYTHON as above, kt-kernel and vLLM stand beside ours.
bench: $(STAMP)
	$(BIN)/python -m bench

docs: $(STAMP)
	$(BIN)/python -m moeconv.cli.reference > docs/cli.md

demo: $(STAMP)
	$(BIN)/moeconv demo

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -maxdepth 1 -name '*.egg-info' -exec rm -rf {} +
