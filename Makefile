# `make book` builds the book, `make test` runs the tests; both first make the environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: book test check clean
.DEFAULT_GOAL := book

book: $(READY)
	$(BIN)/basis book

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
	  f"Python {v[0]}.{v[1]} is too old, 3.10 or newer is needed; name one by: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[book,test]'
	@touch $@

clean:
	rm -rf .venv book/_build book/notebooks book/figures book/generated
