# Targets: demo, test, check, clean. The first that is run makes .venv with the pinned set for this machine.
# Variables: PYTHON (a Python 3.11), PIP_ARGS (e.g. an index that has the CPU build of torch), DEMO (folder of the demo).

PYTHON ?= python3.11
PIP_ARGS ?=
DEMO ?= runs/demo
SET := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
NO_DEPS_cpu := --no-deps
STAMP := .venv/.installed-$(SET)
BIN := .venv/bin

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/m5 demo --out $(DEMO)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy m5 data_prep
	$(BIN)/python -m pytest tests/test_layering.py

$(STAMP): requirements/$(SET).txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(NO_DEPS_$(SET)) -r requirements/$(SET).txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
