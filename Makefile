# make train | test | lint | format | tensorboard | clean, ARGS="..." passes words on, such as
#   make train ARGS="task=gym/CartPole-v1 seed=3"      make test ARGS="-k replay"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: train test lint format tensorboard clean
.DEFAULT_GOAL := train

train: $(READY)
	$(BIN)/python train.py $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tensorboard: $(READY)
	$(BIN)/tensorboard --logdir runs

# Runs stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted install starts again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "loopwm needs Python 3.11 or newer, '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up $(VENV) (about a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
