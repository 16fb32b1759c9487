# demo, example and test need only Python 3.10+ and a C++ compiler: they create .venv, install fastret into it and run.
PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests, a file each: most of them are Python, which fills one core. In the order of folders:
# xdist's own begins with files of many tests and ends with one that is slow.
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
# Python compiles what is imported, when it is.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# Torch's threads would otherwise spin while they wait, and slow whatever shares the machine.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo example test gate gpu lint clean
.NOTPARALLEL:

demo: $(VENV)/.demo
	$(BIN)/fastret train --data glyphs --loss smooth-ap --output runs/demo

example: $(VENV)/.demo
	$(BIN)/python examples/simclr_glyphs.py --out runs/simclr

test: $(VENV)/.test
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# After a change of a Triton kernel: all of them compile, with the oldest Triton that is supported too, and none spills.
OLDEST_TRITON := build/triton-3.6.0
gate: $(VENV)/.test
	test -d $(OLDEST_TRITON) || $(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	$(BIN)/python tests/kernels/gate.py $(OLDEST_TRITON)

# In $(PYTHON) itself, which has torch with CUDA, triton and pytest: such a machine may have no network.
gpu:
	PYTHON=$(PYTHON) scripts/gpu_check.sh

lint: $(VENV)/.test
	$(BIN)/ruff check .
	rm -rf build/typed && $(BIN)/python setup.py --quiet build_py --build-lib build/typed
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p fastret

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable, so that the tests see the checkout; the extension is built inside fastret/.
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
$(VENV)/.demo: $(BIN)/python $(SOURCES)
	$(INSTALL) --editable '.[plot]'
	touch $@
$(VENV)/.test: $(BIN)/python $(SOURCES)
	$(INSTALL) --editable '.[test]'
	touch $@
