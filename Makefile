# make demo | test | bench | lint | native | sanitize | cuda-check | gpu-check (gpu-test, gpu-sanitize, gpu-bench)
# The first call sets up .venv, pinned; later calls find it ready.

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
DEMO ?= full

# That of the GPU here, if there is one.
CUDA_ARCHITECTURES ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -m1 -oE '^[0-9]+\.[0-9]$$' | tr -d .),90)

DEVICE := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
DEPENDENCIES := $(VENV)/.dependencies-$(DEVICE)
READY := $(VENV)/.ready-$(DEVICE)
NATIVE_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
CMAKE := PATH="$(abspath $(dir $(NATIVE_PYTHON))):$$PATH" cmake
TORCH_CPU := torch==2.13.0+cpu

.PHONY: demo test bench lint setup native sanitize sanitize-cpu sanitize-cuda cuda-check gpu-check gpu-test gpu-sanitize gpu-bench
.DEFAULT_GOAL := test

demo: setup
	$(BIN)/python -m examples.lookup_and_compute.demo --seed $(SEED) $(if $(filter smoke,$(DEMO)),--smoke)

# In two processes, a file to each: a module's engine starts once, and an engine needs 3 GB.
test: setup
	$(BIN)/pytest -n 2 --dist loadfile

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

# The ops' tests over a build that watches every access and operation, and the CUDA kernels so in their emulation. Left out:
# what compiles or traces and the references, whose code is torch's. Leaks are not looked for: Python's interpreter leaves many.
SANITIZED_TESTS = $(sort $(wildcard python_tests/test_shards.py python_tests/test_linear_logprob_entropy.py \
  $(foreach source,$(wildcard csrc/*_cpu.cpp),python_tests/test_$(patsubst csrc/%_cpu.cpp,%,$(source))*.py)))
SANITIZED_PYTEST = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 ARPO_SANITIZED=build/sanitize $(NATIVE_PYTHON) -m pytest -q \
  --capture=sys --timeout 600 -k "not opcheck and not compile and not benchmark and not graph and not memory_above \
  and not reference"
sanitize: setup
	$(CMAKE) -S . -B build/sanitize -G Ninja -DARPO_SANITIZE=ON -DARPO_CUDA=OFF \
	  -DPython_EXECUTABLE="$$($(NATIVE_PYTHON) -c 'import sys; print(sys.executable)')" \
	  -Dpybind11_DIR="$$($(NATIVE_PYTHON) -m pybind11 --cmakedir)"
	$(CMAKE) --build build/sanitize
	$(MAKE) -j2 --output-sync sanitize-cpu sanitize-cuda

sanitize-cpu:
	OMP_NUM_THREADS=2 $(SANITIZED_PYTEST) $(SANITIZED_TESTS)

sanitize-cuda:
	OMP_NUM_THREADS=1 $(SANITIZED_PYTEST) python_tests/test_cuda_emulation.py

# Every kernel for every release architecture: fails on a spill, and where a streaming kernel loads less than 16 bytes at a time.
cuda-check: setup
	$(BIN)/python .ci/cuda_check.py

# On a machine with an NVIDIA GPU: the GPU tests, alone and under compute-sanitizer, and the benchmarks beside the peers that
# are installed. Sets nothing up and needs no network: .venv if it is there, else $(PYTHON) with torch, numpy, pybind11,
# cmake, ninja, pytest, pytest-timeout and hypothesis.
GPU_TESTS = $(shell grep -l 'pytest\.mark\.gpu' python_tests/test_*.py)
# Those that launch training in processes of its own: the sanitizers look at single kernels.
GPU_TRAINING = $(wildcard python_tests/test_*_gpu.py)
GPU_PYTEST = $(NATIVE_PYTHON) -m pytest -m gpu $(filter-out $(GPU_TRAINING),$(GPU_TESTS))
SANITIZER = compute-sanitizer --error-exitcode 1
gpu-check:
	$(MAKE) gpu-test
	$(MAKE) gpu-sanitize
	$(MAKE) gpu-bench

gpu-test: native
	$(GPU_PYTEST)
	$(NATIVE_PYTHON) -m pytest -m gpu $(GPU_TRAINING) --timeout 900

# memcheck and initcheck see where a tensor ends only if it has an allocation of its own, which the capture of a graph does
# not allow: the graph tests run with torch's cache. The slow tools look at our own kernels alone.
gpu-sanitize: native
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck $(GPU_PYTEST) --timeout 3000 -k "not graph"
	$(SANITIZER) --tool memcheck $(GPU_PYTEST) --timeout 3000 -k graph
	$(SANITIZER) --tool racecheck --kernel-name kns=arpo $(GPU_PYTEST) --timeout 3000
	$(SANITIZER) --tool synccheck --kernel-name kns=arpo $(GPU_PYTEST) --timeout 3000
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool initcheck --kernel-name kns=arpo $(GPU_PYTEST) --timeout 3000 -k "not graph"

gpu-bench: native
	$(NATIVE_PYTHON) -m benchmarks --device cuda --json benchmarks/results/ops_gpu.json --csv build/ops_gpu.csv
	$(NATIVE_PYTHON) -m benchmarks.tables
