# `make book` builds the book, `make test` runs the tests; both first make the environment in .venv.
# `make pdf` prints the pages of the last `make book`; it needs TeX.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: book pdf test check clean
.DEFAULT_GOAL := book

book: $(READY)
	$(BIN)/basis book

pdf: $(READY)
	$(BIN)/basis book --pdf

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
	  "Python {}.{} was found, but the pinned packages need 3.10 to 3.13; name one: make PYTHON=python3.11".format(*v))'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[book,test]'
	@touch $@

clean:
	rm -rf .venv book/_build book/notebooks book/figures book/generated
