# Needs Python 3.11 or newer, and make. What a target needs is installed into $(VENV), once.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TORCH ?=

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
STATE = $(VENV)/.difflayers
# One stamp per extra. They are the checkout's own: the editable install of an environment that several checkouts share
# points to one of them.
STAMP = $(STATE)/checkout$(subst /,-,$(CURDIR))
STAMPS = $(addprefix $(STAMP)/,demo test docs bench lint dist)
LIMITS = $(STATE)/limits.txt
LOG = $(STATE)/install.log
SHOW_LOG = { tail -n 20 $(LOG); echo "The whole log: $(LOG)"; } >&2
# What pip is held to, as shell commands. Pinned: a torch that is there stays, and constraints.txt is for an environment
# without one; in an environment that wasn't made here, all else that is there stays too: pip adds to it or fails.
# Oldest: the lower bounds in setup.cfg.
VERSIONS = pinned
HOLD_pinned = if [ -e $(STATE)/made-here ]; then keep='^torch=='; else keep='=='; fi; \
    $(PIP) list --format=freeze --exclude difflayers >$(LIMITS).all \
    && { grep "$$keep" $(LIMITS).all || :; } && { grep -q '^torch==' $(LIMITS).all || cat constraints.txt; }
HOLD_oldest = sed -n 's/^ *\([A-Za-z0-9_-]*\)>=\([^ ,]*\)$$/\1==\2/p' setup.cfg $(TORCH:%=| sed 's/^torch==.*/torch==%/')
HOLD_newest = echo $(TORCH:%=torch==%)
UPGRADE_newest = --upgrade --upgrade-strategy eager
# Old releases use what their newer neighbors deprecate.
PYTEST_oldest = -W ignore::DeprecationWarning
BENCHMARKS = $(filter-out benchmarks/peers.py benchmarks/_%,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL = help
.NOTPARALLEL:
.PHONY: demo test oldest newest docs bench lint dist clean help

demo: $(STAMP)/demo  ## the demonstration; ARGS=--quick for a short one
	@$(BIN)/difflayers demo $(ARGS)

# Processes are the parallelism: each has one thread. ARGS="-n 8" for more of them.
test: $(STAMP)/test  ## the tests; ARGS goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(PYTEST_$(VERSIONS)) $(ARGS)

oldest:  ## the tests on the oldest versions that setup.cfg allows, in .venv-oldest; ARGS as above
newest:  ## the tests on the newest versions, in .venv-newest; ARGS as above
oldest newest:
	@rm -rf .venv-$@/.difflayers/checkout-*
	@$(MAKE) --no-print-directory test VENV=.venv-$@ VERSIONS=$@

# Into an empty environment goes nothing but what was built, first the wheel and then the sdist, and what that requires.
dist: $(STAMP)/dist  ## wheel and sdist, in dist, each tried in an empty environment
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . >$(LOG) 2>&1 || { $(SHOW_LOG); exit 1; }
	$(BIN)/twine check --strict dist/*
	@set -e; empty=$$(mktemp -d); trap 'rm -rf "$$empty"' EXIT; $(BIN)/python -m venv "$$empty"; \
	for built in dist/*.whl dist/*.tar.gz; do \
	    echo "== $$built"; \
	    "$$empty/bin/python" -m pip --disable-pip-version-check uninstall --yes difflayers >$(LOG) 2>&1; \
	    "$$empty/bin/python" -m pip --disable-pip-version-check install -c constraints.txt "$$built" >$(LOG) 2>&1 \
	    || { $(SHOW_LOG); exit 1; }; \
	    "$$empty/bin/python" -I tests/smoke.py; \
	done

docs: $(STAMP)/docs  ## the documentation, in docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html $(ARGS)

bench: $(STAMP)/bench $(STAMP)/test  ## the benchmarks
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

# demo, test: mypy reads what is imported.
lint: $(STAMP)/lint $(STAMP)/test $(STAMP)/demo  ## style, types, import order, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

clean:  ## remove what the targets made, except for environments
	rm -rf build dist difflayers.egg-info difflayers-demo docs/_build docs/auto_examples docs/sg_execution_times.rst
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name '.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / {printf "make %-6s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "VENV=path: an environment to use instead of .venv; what it has, such as a GPU build of torch, is kept as it is."
	@echo "PYTHON=command: what makes .venv, python3 unless told."
	@echo "TORCH=version: for oldest and newest, another torch than theirs, whose builds for Linux may take gigabytes."

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) isn't a Python 3.11 or newer. Choose one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@mkdir -p $(STATE)
	@$(PYTHON) -m venv $(VENV) >$(LOG) 2>&1 || { rm -f $@; $(SHOW_LOG); \
	    echo "$(PYTHON) can't make environments. On Debian and Ubuntu, 'apt install python3-venv' brings what it needs." >&2; \
	    echo "Or use an environment that you have: make VENV=/path/to/it ..." >&2; exit 1; }
	@touch $(STATE)/made-here

$(STAMPS): $(STAMP)/%: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@mkdir -p $(@D)
	@for other in $(STATE)/checkout-*; do [ "$$other" = $(@D) ] || rm -rf "$$other"; done
	@echo "Installing difflayers[$*] into $(VENV), a few minutes the first time ..."
	@{ $(HOLD_$(VERSIONS)); } >$(LIMITS) 2>$(LOG) \
	&& $(PIP) install $(UPGRADE_$(VERSIONS)) -c $(LIMITS) -e '.[$*]' >$(LOG) 2>&1 \
	|| { $(SHOW_LOG); exit 1; }
	@touch $@
