PYTHON ?= python3
CUDA_ARCHITECTURES ?= 90

# NATIVE_FLAGS=-DARPO_CUDA=OFF builds without CUDA although nvcc is there.
.PHONY: native
native:
	cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	  -Dpybind11_DIR="$$($(PYTHON) -m pybind11 --cmakedir)" -DARPO_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(NATIVE_FLAGS)
	cmake --build build/native
