# Targets: demo, test, check, bench, install, clean. The first that is run makes .venv with the pinned set for this machine.
# Variables: PYTHON (a Python 3.11), PIP_ARGS (e.g. an index that has the CPU build of torch), DEMO (folder of the demo),
# BENCH (benchmarks to run, of those that `m5 bench` lists).

PYTHON ?= python3.11
PIP_ARGS ?=
DEMO ?= runs/demo
BENCH ?= step loader embedding softmax history smoe evaluate scaling
SET := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
STAMP := .venv/.installed-$(SET)
BIN := .venv/bin

.PHONY: demo test check bench install clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/m5 demo --out $(DEMO)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy m5 data_prep tune benchmarks/literature
	$(BIN)/hadolint docker/Dockerfile.cpu docker/Dockerfile.cuda
	$(BIN)/shellcheck docker/install.sh docker/train.sbatch .ci/run
	$(BIN)/python -m pytest tests/test_layering.py

bench: $(STAMP)
	for name in $(BENCH); do $(BIN)/m5 bench $$name || code=$$?; done; exit $${code:-0}

install: $(STAMP)

# The steps are docker/install.sh's, which the images run too. The stamp comes last, so an installation that was
# interrupted is taken up again.
$(STAMP): docker/install.sh requirements/common.txt requirements/$(SET).txt requirements/no-deps.txt pyproject.toml
	PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" docker/install.sh requirements $(SET) .venv
	docker/install.sh project .venv
	touch $@

# Not runs/: it may hold hours of training.
clean:
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
