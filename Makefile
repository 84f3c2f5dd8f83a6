# "make help" lists the targets. Each makes $(VENV) if it is missing and installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo-out
ARGS   ?=
SEEDS  ?= 1 2 3 4 5 6 7 8 9 10
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

BIN    := $(VENV)/bin
DEPS   := $(VENV)/.longvita-deps
CORE   := $(VENV)/.longvita-core
SOURCE := $(shell find csrc -type f)
# One OpenMP thread per worker: the workers themselves fill the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all seeds isa bench cuda-check lint clean

help:
	@echo "make demo       train a tiny Long-VITA through all four stages and ask it questions (OUT=$(OUT); a first look: ARGS=--quick OUT=demo-quick; longer training: ARGS=--full OUT=demo-full)"
	@echo "make test       the tests"
	@echo "make test-all   the tests and everything slow that 'make test' leaves out; writes tests/RESULTS.md"
	@echo "make seeds      the tests of the ops, once for each seed of their samples in SEEDS (\"$(SEEDS)\")"
	@echo "make isa        the tests of the ops on every instruction set of the kernels and of torch that this machine has"
	@echo "make bench      speed and memory of the ops beside their peers (ARGS=\"varlen_attention --dtype float32\"; --help tells the rest)"
	@echo "make cuda-check compile every GPU kernel and look at registers, spills and shared memory (needs nvcc, no GPU; ARGS=--help)"
	@echo "make lint       ruff"
	@echo "make install    only prepare $(VENV)"
	@echo "make clean      remove build outputs (keeps $(VENV) and $(OUT))"

install: $(CORE)

# torch goes first and by itself: whichever build of it this machine's index offers is taken, and nothing after it may change it.
$(DEPS): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	LONGVITA_NATIVE=0 $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,demo]"
	@touch $@

# The native core is built in place, so that an edit in csrc/ compiles that file alone.
$(CORE): $(DEPS) $(SOURCE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(CORE)
	$(BIN)/longvita demo --out $(OUT) $(ARGS)

test: $(CORE)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(CORE)
	$(PYTEST) --result tests/RESULTS.md $(ARGS)

seeds: $(CORE)
	set -e; for seed in $(SEEDS); do $(PYTEST) -m "not slow" --sample-seed $$seed tests/ops tests/triton tests/cuda $(ARGS); done

isa: $(CORE)
	$(PYTEST) -m isa $(ARGS)

bench: $(CORE)
	$(BIN)/python -m bench $(ARGS)

cuda-check: $(DEPS)
	$(BIN)/python -m bench.cuda_check $(ARGS)

lint: $(CORE)
	$(BIN)/python -m ruff check .

clean:
	rm -rf $(CORE) build dist *.egg-info longvita_kernels/*.so .pytest_cache .ruff_cache .hypothesis
