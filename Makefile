# `make demo` and `make test` do all set-up themselves. VENV=path reuses an environment.
# WITH='torch==2.9.1' and the like choose versions, when one is made.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: demo test test-all wheel bench peers runtimes lint sanitize attack mutants clean

# glibc gives memory above 128 KiB back at once, and the kernel clears it anew for each activation: a
# third of a training step here. With these it keeps what it has.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=67108864

demo: $(VENV)/.demo
	$(KEEP_MEMORY) $(BIN)/quanttune demo $(ARGS)

# a file of tests per process, each of one thread: two that share two cores wait for each other. Where a
# test takes more, those that wait sleep: by default they spin, on a core that another test could use.
# `test` leaves out what another test holds already (tests/slow.py); `test-all` leaves out nothing.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PYTEST) $(if $(filter test,$@),-m 'not slow') $(ARGS)

# dist/: the sources, and a wheel for every Linux that its name tells
wheel: $(VENV)/.wheel
	rm -rf build/dist dist
	$(BIN)/python -m build --outdir build/dist
	. $(BIN)/activate && auditwheel repair --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist

# every op beside its rivals, then the table of ratios. ARGS go to ratios.py, for instance --strict;
# JSON=benchmarks/results/<machine>/cpu-ratios.json keeps what it measured.
JSON ?= build/cpu-ratios.json
BRIEF := --benchmark-max-time 0.3 --benchmark-min-rounds 5 --benchmark-group-by group,param \
	--benchmark-columns median,iqr,rounds --benchmark-sort fullname
bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' $(BRIEF)
	$(BIN)/python -m benchmarks.kernels.ratios --runs 3 --json $(JSON) $(ARGS)

# other libraries, in an environment of their own: what their fake quantization takes, and what their
# models are worth on the rows of the demo, which depend on the packages of its own environment
ROWS := build/rival-rows.safetensors
RIVALS ?= build
peers: $(VENV)/.demo
	$(MAKE) VENV=.venv-peers .venv-peers/.peers
	.venv-peers/bin/python -m benchmarks.kernels.peers $(ARGS)
	$(BIN)/python -m benchmarks.rivals --rows $(ROWS) --write-rows
	.venv-peers/bin/python -m benchmarks.rivals --rows $(ROWS) --out $(RIVALS)

# exported programs in ExecuTorch and LiteRT, files in tract and as a browser runs them (by node, if there is
# npm), in an environment of its own
WEB := onnxruntime-web@1.30.0
runtimes:
	$(MAKE) VENV=.venv-runtimes .venv-runtimes/.runtimes
	command -v npm >/dev/null && npm install --silent --prefix build/web $(WEB) || true
	.venv-runtimes/bin/python -m pytest -p no:anyio tests/runtimes $(ARGS)  # it warns, which is an error here
	.venv-runtimes/bin/python -m benchmarks.deploy.edge_run --out build

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the kernels with checks of addresses and of undefined behaviour; the tests load this build, not the other
CHECKS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
KERNEL_TESTS := fake_quantization outlier_statistics range_search cpu_kernels rounded_linear lsq
sanitize: $(VENV)/.test
	rm -rf build/sanitize/lib
	QUANTTUNE_CXXFLAGS='$(CHECKS)' $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH='$(CURDIR)/build/sanitize/lib' \
	$(BIN)/python -m pytest $(KERNEL_TESTS:%=tests/test_%.py) $(ARGS)

# cases that nobody wrote down, for half an hour; ARGS such as --minutes 5. It goes on where it was stopped.
# ATTACKED=benchmarks/results/<machine>/attack.json keeps what came of it.
ATTACKED ?= build/attack.json
attack: $(VENV)/.test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.reliability.attack --json $(ATTACKED) $(ARGS)

# faults made on purpose, one at a time: which of them does no test see?
MUTATED ?= build/mutants.json
mutants: $(VENV)/.test
	$(BIN)/python -m benchmarks.reliability.mutants --json $(MUTATED) $(ARGS)

clean:
	rm -rf .venv .venv-* build dist quanttune.egg-info quanttune/*.so

# One stamp per extra: the package is installed again when its C++ sources or its metadata change. It is
# compiled while torch is installed, and Python's modules at the end, in parallel, which pip does not;
# but for the models of transformers, of which few are ever imported.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile
COMPILE := PYTHONWARNINGS=ignore $(BIN)/python -m compileall -qq -j 0 -x 'transformers/models/|/tests?/'
$(VENV)/.%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) --no-deps --editable . & own=$$!; $(PIP) torch $(WITH) && wait $$own
	$(PIP) 'quanttune[$*]' $(WITH)
	$(COMPILE) $(VENV)/lib >/dev/null 2>&1 || true  # some packages hold templates that are no Python
	touch $@
