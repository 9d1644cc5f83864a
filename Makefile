.PHONY: demo test lint install clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The stamp makes both targets fast the second time: pip runs only when the dependencies change.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/gradsync compare --demo

test: install
	$(BIN)/python -m pytest --durations 40

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist *.egg-info
