# `make demo` and `make test` do all set-up themselves. VENV=path reuses an environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: demo test bench lint clean

demo: $(VENV)/.demo
	$(BIN)/quanttune demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build quanttune.egg-info quanttune/*.so

# one stamp per extra: the package is installed again when its C++ sources or its metadata change
$(VENV)/.%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
