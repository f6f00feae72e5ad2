# make demo   install into .venv, train on the embedded data set with combined noise
# make test   install into .venv, run the tests, but for some that take long
# make test-all   run every test
# make notebooks  execute the notebooks, copies to runs/notebooks; FAST=1: in short form
# make docs   build the pages of docs/ into site/
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
FAST ?=

.PHONY: demo test test-all notebooks docs lint

# The stamp is renewed when the requirements or the Python change.
STAMP = $(VENV)/installed-$(notdir $(PYTHON))

$(STAMP): setup.py requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("cbmlc_jax needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.12" if not (3, 11) <= sys.version_info[:2] < (3, 14) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[test]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/python -m cbmlc_jax.main --config.noise.kind=combined --workdir=$(RUNS)/demo-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP)
	$(VENV)/bin/python -m pytest --numprocesses=auto --maxprocesses=4 -m "not slow"

test-all: $(STAMP)
	$(VENV)/bin/python -m pytest --numprocesses=auto --maxprocesses=4

notebooks: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[notebooks]'
	$(VENV)/bin/python -m experiments.notebooks --output=$(RUNS)/notebooks $(if $(FAST),--fast)

docs: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

lint: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
