# `make demo` and `make test` need nothing but Python 3.11, its headers and a C compiler; what is missing is named first.
# PYTHON=python3.12 chooses another interpreter (after `make clean`), VENV another folder, ARGS goes to pytest or fdpass-bench.

VENV ?= .venv
PYTHON ?=
ARGS ?=
export PYTHON

# The installation is editable: the compiled module lies in fdpass/, so the source tree cannot hide it.
SOURCES := pyproject.toml setup.py $(wildcard _native/* _native/bench/*)

.DEFAULT_GOAL := help
.PHONY: help demo test bench docs lint sanitize fallback environment clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.with-bench ## build, then show how each strategy shares a port
	@$(VENV)/bin/fdpass-bench $(ARGS)

test: $(VENV)/.with-programs ## build, then run the tests
	@$(VENV)/bin/python -m pytest $(ARGS)

bench: $(VENV)/.with-programs ## run the benchmarks, fdpass against C and the standard library
	@$(VENV)/bin/python -m pytest bench/suites $(ARGS)

docs: $(VENV)/.with-docs ## build the documentation into docs/_build/html
	@$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "fdpass: docs/_build/html/index.html"

lint: $(VENV)/.with-lint ## ruff and mypy --strict
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy

sanitize: ## the tests that reach the C on a build with AddressSanitizer and UBSan
	@.ci/variant sanitize .venv-sanitize $(ARGS)

fallback: ## the tests of the lower floors on the portable C, forced on Linux
	@.ci/variant fallback .venv-fallback $(ARGS)

environment: ## all that test, lint and docs need, in one installation: each for itself would build anew below the others
	@.ci/install $(VENV) --editable '.[programs,lint,docs]' build
	@touch $(VENV)/.with-bench $(VENV)/.with-programs $(VENV)/.with-lint $(VENV)/.with-docs

clean: ## remove environments and everything built
	rm -rf $(VENV) .venv-sanitize .venv-fallback build dist docs/_build *.egg-info fdpass/*.so fdpass/_native.c bench/fdpass_bench/*.so

$(VENV)/.with-%: $(SOURCES)
	@.ci/install $(VENV) --editable '.[$*]'
	@touch $@
