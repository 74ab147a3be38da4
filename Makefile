# Each target sets up what it needs first; make help names them.

PYTHON_VENV := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench deb clean

help:
	@echo "make setup           system packages (apt) and .venv; does nothing where all is there"
	@echo "make demo            a real Glance and a mount, and what they do   KEEP=1 leaves them running"
	@echo "make test            the tests                                     ARGS='-k store'"
	@echo "make lint            ruff and mypy"
	@echo "make bench           the benchmarks                                ARGS=..."
	@echo "make deb             a Debian package for this machine's Python, in dist/"
	@echo "make clean           removes what the above have made, .venv included"

setup:
	@setup/install

demo: setup
	@KEEP="$(KEEP)" $(PYTHON_VENV) -m demo $(ARGS)

test:
	@setup/install test
	@$(PYTHON_VENV) -m pytest $(ARGS)

lint: setup
	@$(PYTHON_VENV) -m ruff check
	@$(PYTHON_VENV) -m ruff format --check
	@$(PYTHON_VENV) -m mypy

bench:
	@setup/install bench
	@$(PYTHON_VENV) -m bench $(ARGS)

deb:
	@setup/install deb
	@setup/package

clean:
	rm -rf .venv .guest .tools build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
