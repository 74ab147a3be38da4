# Each target sets up what it needs first; make help names them.

PYTHON_VENV := .venv/bin/python
# Half of what the tests do is to wait.
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench docs man pictures deb clean

help:
	@echo "make setup           system packages (apt) and .venv; does nothing where all is there"
	@echo "make demo            a real Glance and a mount, and what they do   KEEP=1 leaves them running"
	@echo "make test            the tests                                     ARGS='-k store'"
	@echo "make lint            ruff and mypy"
	@echo "make pictures        the pictures of docs/commands.md, from a real daemon"
	@echo "make bench           the benchmarks                                ARGS=..."
	@echo "make docs            the documentation as a site: build/docs/html/index.html"
	@echo "make man             the manual pages: build/man"
	@echo "make deb             a Debian package for this machine's Python, in dist/"
	@echo "make clean           removes what the above have made, .venv included"

setup:
	@setup/install

demo: setup
	@KEEP="$(KEEP)" $(PYTHON_VENV) -m demo $(ARGS)

test:
	@setup/install test
	@$(PYTHON_VENV) -m pytest -n $(TEST_PROCESSES) $(ARGS)

lint: setup
	@$(PYTHON_VENV) -m ruff check
	@$(PYTHON_VENV) -m ruff format --check
	@$(PYTHON_VENV) -m mypy

pictures: setup
	@$(PYTHON_VENV) -m demo.pictures

bench:
	@setup/install bench
	@$(PYTHON_VENV) -m bench $(ARGS)

# -E: what is wrong is said each time, also of pages that have not changed.
SPHINX := $(PYTHON_VENV) -m sphinx -E -W --keep-going -n -q

docs:
	@setup/install docs
	@$(SPHINX) -b html -d build/docs/doctrees docs build/docs/html
	@! grep -rEn --include='*.html' '<(link|script|img|iframe)[^>]*(href|src)="(https?:)?//' build/docs/html || \
		{ echo "a page asks somebody else for a part of itself"; exit 1; }
	@echo "build/docs/html/index.html"

man:
	@setup/install docs
	@$(SPHINX) -b man -t man -d build/docs/doctrees-man docs build/man
	@ls build/man/*.[58]

deb:
	@setup/install deb
	@setup/package

clean:
	rm -rf .venv .guest .tools .nova build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
