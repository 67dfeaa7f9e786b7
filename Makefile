# make demo | test | bench | lint | native | cuda-check | gpu-check
# The first call sets up .venv, pinned; later calls find it ready.

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
DEMO ?= full

CUDA_ARCHITECTURES ?= 90

DEVICE := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
DEPENDENCIES := $(VENV)/.dependencies-$(DEVICE)
READY := $(VENV)/.ready-$(DEVICE)
NATIVE_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
CMAKE := PATH="$(abspath $(dir $(NATIVE_PYTHON))):$$PATH" cmake
TORCH_CPU := torch==2.13.0+cpu

.PHONY: demo test bench lint setup native cuda-check
.DEFAULT_GOAL := test

demo: setup
	$(BIN)/python -m examples.lookup_and_compute.demo --seed $(SEED) $(if $(filter smoke,$(DEMO)),--smoke)

test: setup
	$(BIN)/pytest

bench: setup
	$(BIN)/arpo-ext bench $(BENCH)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: $(READY)

$(DEPENDENCIES): $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(VENV)
ifeq ($(DEVICE),cpu)
	$(PIP) --no-deps $(TORCH_CPU) || $(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH_CPU)
	$(PIP) --no-deps -r requirements/cpu.txt
else
	$(PIP) -r requirements/cuda.txt
endif
	touch $@

# The package is linked into .venv, not copied: edits count at once, `make native` renews the compiled part in place.
$(READY): $(DEPENDENCIES) pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PIP) --no-deps --editable . -C editable.mode=inplace -C wheel.cmake=false
	$(MAKE) native
	touch $@

CONFIGURE = $(CMAKE) -S . -G Ninja \
  -DPython_EXECUTABLE="$$($(NATIVE_PYTHON) -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$$($(NATIVE_PYTHON) -m pybind11 --cmakedir)"

# NATIVE_FLAGS=-DARPO_CUDA=OFF builds without CUDA although nvcc is there.
native:
	$(CONFIGURE) -B build/native -DARPO_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(NATIVE_FLAGS)
	$(CMAKE) --build build/native

# Every CUDA source for every release architecture. Prints registers per kernel, fails if one spills; with cuobjdump the
# machine code is left in build/cuda-check/sass.txt.
cuda-check:
	$(CONFIGURE) -B build/cuda-check -DARPO_CUDA_ARCHITECTURES=release -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
	  -DARPO_OUTPUT_DIRECTORY="$(CURDIR)/build/cuda-check/module"
	$(CMAKE) --build build/cuda-check --clean-first >build/cuda-check/log.txt 2>&1 || { cat build/cuda-check/log.txt; exit 1; }
	! command -v cuobjdump >/dev/null || cuobjdump --dump-sass build/cuda-check/module/_C*.so >build/cuda-check/sass.txt
	c++filt <build/cuda-check/log.txt | awk '/Compiling entry function/ {kernel = $$0; sub(/.*function ./, "", kernel)} \
	  /spill stores/ {spilled = $$5 + $$9} \
	  /Used [0-9]+ registers/ {kernels++; bad += spilled > 0; print $$5, "registers,", spilled, "bytes spilled:", kernel} \
	  END {print kernels + 0, "kernels,", bad + 0, "with spills"; exit !kernels || bad}'
