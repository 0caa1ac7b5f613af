# One environment, made from this file: every target builds what it needs.
PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)
# One thread a test process: two processes with two threads each would wait for each other.
# Bytecode is kept also where the environment says not to: without it every test process compiles the tests again.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(CORES) --dist worksteal

.PHONY: setup demo demo-edit studio test test-slow test-simulated-gpu check bench docs tiny clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a LoRA on 24 tarot cards, on any machine; ends with pictures and numbers"
	@echo "make demo-edit  train a LoRA on 40 pairs of pictures, an edit; likewise"
	@echo "make studio     a page in the browser: pictures and captions, training, runs, adapters"
	@echo "make test       the CPU test suite"
	@echo "make check      lint, format, types and make test"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-simulated-gpu   CUDA code on a simulated GPU (tests/simulated_gpu): 5 GB to install, minutes to run"
	@echo "make tiny       draw the pictures and train the embedded model again (hours)"
	@echo "make docs       the documentation as a site, in build/site"
	@echo "make bench      the side-by-side benchmarks for this machine, and the documentation's tables from them"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flux2-lora needs Python 3.11 or newer, this is %s: make PYTHON=python3.11" % sys.version.split()[0])'
	@echo "installing what is needed into .venv: some GB, some minutes, once; pip shows each package"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[triton]'
	@touch $@

demo: setup
	$(BIN)/python train/demo.py

demo-edit: setup
	$(BIN)/python train/demo_edit.py

studio: setup
	$(BIN)/python train/studio.py $(FOLDERS)

test: setup
	$(PYTEST) -m 'not slow'

test-slow: setup
	$(PYTEST) -m slow

# An environment of its own, with a CUDA build of PyTorch; everything else has the versions of constraints.txt.
CUDA_VENV := .venv-cuda
CUDA_TORCH := 2.11.0

$(CUDA_VENV)/installed: pyproject.toml constraints.txt
	@echo "installing a CUDA build of PyTorch and what the tests need into $(CUDA_VENV): 5 GB, some minutes, once"
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	grep -v '^torch==' constraints.txt > $(CUDA_VENV)/constraints.txt && echo torch==$(CUDA_TORCH) >> $(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CUDA_VENV)/constraints.txt -e '.[dev]'
	@touch $@

# Both runs write tests/simulated_gpu/results.json.
SIMULATED := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= SIMULATED_GPU_GB=400 SIMULATED_GPU_RESULTS=1
SIMULATED_PYTEST := $(CUDA_VENV)/bin/python tests/simulated_gpu/build.py $(CUDA_VENV)/bin/python -m pytest \
  -n $(CORES) --dist worksteal -m 'not gpu_values'

test-simulated-gpu: $(CUDA_VENV)/installed
	$(SIMULATED) SIMULATED_GPU_COUNT=1 $(SIMULATED_PYTEST) tests/simulated_gpu tests/gpu
	$(SIMULATED) SIMULATED_GPU_COUNT=2 $(SIMULATED_PYTEST) tests/simulated_gpu/test_split.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

tiny: setup
	$(BIN)/python -m train.tiny_model

bench: setup
	$(BIN)/python benchmarks/step.py
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(BIN)/python benchmarks/matrix.py && $(BIN)/python benchmarks/fits.py && $(BIN)/python benchmarks/inference.py; fi
	$(BIN)/python benchmarks/tables.py

docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv .venv-cuda outputs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
