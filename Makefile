# `make demo` and `make test` do all set-up themselves. VENV=path reuses an environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: demo test bench lint clean

# glibc gives memory above 128 KiB back at once, and the kernel clears it anew for each activation: a
# third of a training step here. With these it keeps what it has.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864

demo: $(VENV)/.demo
	$(KEEP_MEMORY) $(BIN)/quanttune demo $(ARGS)

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
