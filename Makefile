# Everything runs in .venv; a fresh machine needs Python >= 3.11 with venv and pip, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt
TESTS := $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test test-long lint format types imports docs notebooks constraints clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## install the package with its run-time requirements into .venv

install-dev: $(VENV)/.installed-dev  ## the same with what tests and checks need (torch, libtpu, ruff, ...)

quickstart: install  ## train a small model that searches and writes (again with ARGS=--fresh)
	@$(BIN)/grit-jax quickstart $(ARGS)

test: install-dev  ## run the tests (under 12 minutes on 2 cores)
	@$(TESTS) -m "not long" $(ARGS)

test-long: install-dev  ## run the tests that take longer
	@$(TESTS) -m long $(ARGS)

lint: install-dev  ## check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/shellcheck --external-sources launch/*.sh

format: install-dev  ## rewrite files in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: install-dev  ## check types
	@$(BIN)/ty check grit_jax benchmarks

imports: install-dev  ## check that imports point down, and that what is imported is declared
	@$(BIN)/lint-imports
	@$(BIN)/deptry .

# Without --quiet, under which mkdocs counts no warnings and --strict lets everything pass.
docs: install-dev  ## build the documentation into site/, with no broken link or reference
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: install-dev  ## write launch/colab/*.ipynb anew from their .py
	@$(BIN)/jupytext --quiet --update --to ipynb launch/colab/*.py

constraints: install-dev  ## resolve constraints.txt anew
	@echo "# Versions that the tests run with, for Python 3.11 to 3.13; made by \`make constraints\`." > constraints.new
	@$(BIN)/uv pip compile --quiet --universal --fork-strategy fewest --python-version 3.11.5 --all-extras --no-emit-index-url \
		--no-header --no-annotate pyproject.toml >> constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove .venv
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " \
		+ sys.version.split()[0] + "; name another with make PYTHON=...")'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing grit_jax and its run-time requirements into $(VENV)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing grit_jax with everything for tests and checks into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed
