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

.PHONY: demo test bench lint setup native cuda-check gpu-check
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
	$(PIP) --no-deps -r requirements/bench.txt
	touch $@

# The package is linked into .venv, not copied: edits count at once, `make native` renews the compiled part in place.
$(READY): $(DEPENDENCIES) pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PIP) --no-deps --editable . -C editable.mode=inplace -C wheel.cmake=false
	$(MAKE) native
	touch $@

# NATIVE_FLAGS=-DARPO_CUDA=OFF builds without CUDA although nvcc is there.
native:
	$(CMAKE) -S . -B build/native -G Ninja \
	  -DPython_EXECUTABLE="$$($(NATIVE_PYTHON) -c 'import sys; print(sys.executable)')" \
	  -Dpybind11_DIR="$$($(NATIVE_PYTHON) -m pybind11 --cmakedir)" \
	  -DARPO_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(NATIVE_FLAGS)
	$(CMAKE) --build build/native

# Every kernel for every release architecture: ptxas fails on a spill; the hot kernels must load 16 bytes at a time.
CUDA_RELEASE := 80 86 89 90 100 120
CUOBJDUMP = $(firstword $(shell command -v cuobjdump) $(wildcard $(VENV)/lib/python*/site-packages/triton/backends/nvidia/bin/cuobjdump))
cuda-check: setup
	@mkdir -p build/cuda-check
	@set -e; for source in $(filter-out csrc/device_cuda.cu,$(wildcard csrc/*_cuda.cu)); do for arch in $(CUDA_RELEASE); do \
	  cubin=build/cuda-check/$$(basename $$source .cu).sm_$$arch.cubin; \
	  nvcc -std=c++17 -O3 -lineinfo -Icsrc -arch=sm_$$arch -cubin -Xptxas=-v,-warn-spills,-Werror -o $$cubin $$source 2>$$cubin.log \
	    || { cat $$cubin.log; exit 1; }; \
	  echo "$$source sm_$$arch: $$(grep -c 'Compiling entry' $$cubin.log) kernels, at most" \
	    "$$(grep -o 'Used [0-9]* registers' $$cubin.log | sort -k2n | tail -1 | cut -d' ' -f2) registers, no spills," \
	    "$$($(CUOBJDUMP) --dump-sass $$cubin | grep -c 'LDG.*\.128') loads of 16 bytes"; \
	done; done
	@set -e; for arch in $(CUDA_RELEASE); do $(CUOBJDUMP) --dump-sass build/cuda-check/logprob_entropy_cuda.sm_$$arch.cubin \
	  | grep -q 'LDG.*\.128' || { echo "logprob_entropy for sm_$$arch has no 16-byte load"; exit 1; }; done

# On a machine with an NVIDIA GPU: the GPU tests, alone and under compute-sanitizer, and the benchmarks. Sets nothing up and
# needs no network: .venv if it is there, else $(PYTHON) with torch, pybind11, cmake, ninja, pytest, pytest-timeout and
# hypothesis.
gpu-check: native
	$(NATIVE_PYTHON) -m pytest -m gpu
	compute-sanitizer --error-exitcode 1 $(NATIVE_PYTHON) -m pytest -m gpu
	$(NATIVE_PYTHON) -m arpo_ext bench --device cuda
