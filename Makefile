# Every target works from a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8501
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: demo test test-slow lint types bench dashboard model browser clean help

help:
	@echo "make demo       from weights to features in the browser, at http://127.0.0.1:$(PORT)"
	@echo "make test       lint, types and the tests (a few minutes)"
	@echo "make test-slow  the tests that take long or need several GB"
	@echo "make lint       ruff;  make types  pyright"
	@echo "make bench      measure the hot paths, write the table to artifacts/reports/"
	@echo "make dashboard  the browser pages alone;  make clean  remove what the targets made"

$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is wanted, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the packages (a few minutes the first time)"
	@$(INSTALL) .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(INSTALL) '.[backends,dev]'
	@touch $@

# SmolLM2's weights, fetched and converted once into the user's cache.
model: $(VENV)/.core
	@$(BIN)/python -c 'import logging; logging.basicConfig(level="INFO", format="%(message)s"); from probe.models import smollm2_folder; smollm2_folder()'

# Chromium for the browser tests, which are skipped, with a reason, where it cannot be had.
browser:
	@if test ! -x /usr/bin/chromium && command -v apt-get >/dev/null; then \
		echo "installing chromium"; \
		run=""; test "$$(id -u)" = 0 || run="sudo -n"; \
		{ $$run apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$run apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
			|| echo "chromium could not be installed: the browser tests will be skipped"; \
	fi

demo: model
	@$(BIN)/lorgnette demo --port $(PORT)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

# Two processes, each with whole files: they wait for browsers and kernels part of their time.
test: lint types model browser
	$(BIN)/pytest --numprocesses 2 --no-loadscope-reorder

test-slow: $(VENV)/.dev model browser
	$(BIN)/pytest -m slow

bench: $(VENV)/.dev model
	$(BIN)/python -m tests.bench

dashboard: $(VENV)/.core
	@$(BIN)/lorgnette dashboard --port $(PORT)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis artifacts/activations artifacts/saes
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
