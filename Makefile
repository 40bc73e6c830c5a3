# From a bare Python 3.11 or newer: `make demo`, `make test`. Nothing is installed outside .venv.
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
WORKERS ?= 2
TESTS ?=
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
INPUTS := pyproject.toml $(CONSTRAINTS)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) -c $(CONSTRAINTS)
export PYTHONUTF8 = 1
# Of the base models that a run of the suite draws (tests/model/test_bases.py).
export SEED ?= $(shell date +%Y%m%d)

.PHONY: help demo test test-lowest test-latest slow packages workflows check lint imports types documents site format docs readme repin clean
.DEFAULT_GOAL := help

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## build, train, compare and use a mixture of four experts (2 minutes)
	$(BIN)/loramix demo

test: $(VENV)/.installed-test ## the test suite, without what is slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(TESTS)

test-lowest: ## the test suite with the lowest versions, those of constraints-lowest.txt
	$(MAKE) test VENV=build/venv-lowest CONSTRAINTS=constraints-lowest.txt

test-latest: ## the test suite with the newest version of everything; if it fails, what is newer than constraints.txt
	$(MAKE) test VENV=build/venv-latest CONSTRAINTS=/dev/null || { \
	    echo "newer here than in constraints.txt:"; \
	    build/venv-latest/bin/python -m pip freeze --exclude-editable | grep -vxFf constraints.txt; exit 1; }

slow: $(VENV)/.installed-dev ## the slow tests: examples, kernels in an interpreter, processes that are killed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow

check: lint imports types documents site packages workflows ## all of the following, up to the workflows

lint: $(VENV)/.installed-dev ## style
	$(BIN)/ruff check
	$(BIN)/ruff format --check

imports: $(VENV)/.installed-dev ## imports that run one way
	$(BIN)/lint-imports --no-logo

types: $(VENV)/.installed-dev ## types
	$(BIN)/pyright --pythonpath $(BIN)/python --warnings

documents: $(VENV)/.installed-dev ## public names, code blocks, links and examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" tests/project/test_public_names.py \
	    tests/project/test_imports.py tests/docs

site: $(VENV)/.installed-dev ## the documentation, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

packages: $(VENV)/.installed-dev ## the wheel and the source distribution, into dist, and whether an index would take them
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*

workflows: $(VENV)/.installed-dev ## the files in .github and CITATION.cff, against the schemas that ship with the linter
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: $(VENV)/.installed-dev ## rewrite the sources in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.installed-dev ## redraw the pages that are made by a script
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_architecture.py
	$(BIN)/python -m benchmarks.report docs/benchmarks.json
	$(BIN)/python -m docs.make_speed
	$(BIN)/python docs/make_memory.py
	$(BIN)/python docs/make_formats.py
	$(BIN)/python docs/make_routers.py
	$(BIN)/python docs/make_routing.py
	$(BIN)/python docs/make_notebook.py

readme: $(VENV)/.installed-dev ## run the demo and put what it printed into README.md
	$(BIN)/python docs/make_demo.py

repin: ## solve all versions anew and write them to constraints.txt
	$(PYTHON) -m venv --clear build/repin
	build/repin/bin/python -m pip install --quiet $(PIP_FLAGS) -e '.[dev]'
	sed -n '/^#/p' constraints.txt > build/repin/constraints.txt
	build/repin/bin/python -m pip freeze --all --exclude-editable | sed -e '/^pip==/d' -e 's/+[a-z0-9.]*$$//' | \
	    LC_ALL=C sort -f >> build/repin/constraints.txt
	mv build/repin/constraints.txt constraints.txt

clean: ## remove what make made
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("loramix needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make demo PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }

# One stamp for each set of extras: an install is repeated when what it reads has changed.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV), once: a minute or two"
	@$(PIP) -e '.[train,plot]'
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV), once: a minute or two"
	@$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV), once: a minute or two"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed
