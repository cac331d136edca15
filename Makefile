# Targets: demo, test, check, install, clean. The first that is run makes .venv with the pinned set for this machine.
# Variables: PYTHON (a Python 3.11), PIP_ARGS (e.g. an index that has the CPU build of torch), DEMO (folder of the demo).

PYTHON ?= python3.11
PIP_ARGS ?=
DEMO ?= runs/demo
SET := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
STAMP := .venv/.installed-$(SET)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check install clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/m5 demo --out $(DEMO)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy m5 data_prep
	$(BIN)/python -m pytest tests/test_layering.py

install: $(STAMP)

# The stamp comes last, so an installation that was interrupted is taken up again.
$(STAMP): requirements/common.txt requirements/$(SET).txt requirements/no-deps.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "M5's pinned set is for Python 3.11. Say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "Installing requirements/$(SET).txt into .venv: some minutes and 3 GB the first time."
	$(PIP) $(PIP_ARGS) -r requirements/$(SET).txt
	$(PIP) $(PIP_ARGS) --no-deps -r requirements/no-deps.txt
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

# Not runs/: it may hold hours of training.
clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
