# Python to make .venv with; python3 is tried after it.
PYTHON ?= python3
# More arguments for pytest, e.g. make test PYTEST_ARGS="-x -k cache"
PYTEST_ARGS ?=
# Processes that tests run in; each takes about 2 GiB.
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
CODE := src tests recipes examples setup.py
# accelerate launch gives a CPU process one thread per physical core it can see, in a container often one in all.
THREADS = $${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)}
RECIPE := recipes/smollm2-135m

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-slow style quality clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the package with its development tools

$(STAMP): setup.py constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
		for python in "$(PYTHON)" python3; do \
			if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then \
				echo "making $(VENV) with $$("$$python" --version)"; \
				"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
				break; \
			fi; \
		done; \
	fi
	@if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then \
		echo "error: Python 3.10 or newer is needed: make setup PYTHON=/path/to/python3 (and no older $(VENV))" >&2; \
		exit 1; \
	fi
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(PIP) install "$$(grep -E '^torch==' constraints.txt)"
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup ## prune SmolLM2-135M end to end on the CPU
	@set -e; \
	model="$$($(BIN)/python $(RECIPE)/get_model.py)"; \
	$(BIN)/accelerate launch --quiet --config_file recipes/accelerate_configs/cpu.yaml \
		--num_cpu_threads_per_process "$(THREADS)" \
		recipes/prune.py --config $(RECIPE)/demo.yaml --model_name_or_path "$$model"

docs: setup ## write docs/architectures.md: what becomes of every architecture (some 15 minutes)
	$(BIN)/python tests/architecture_walk.py

test: setup ## run the tests that need neither network nor accelerator nor much time
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not network and not gpu and not slow" $(PYTEST_ARGS)

test-slow: setup ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not network and not gpu" $(PYTEST_ARGS)

style: setup ## fix style and format
	$(BIN)/ruff check --fix $(wildcard $(CODE))
	$(BIN)/ruff format $(wildcard $(CODE))

quality: setup ## check style and format
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check $(wildcard $(CODE))

clean: ## remove what builds, tests and recipes leave behind (not .venv)
	rm -rf build dist outputs .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests recipes examples -name __pycache__ -type d -prune -exec rm -rf {} + 2> /dev/null || true
