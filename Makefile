# What a person runs is what CI runs. The environment lives in .venv and is made anew when a version changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Most modules of the packages are never imported: to compile them all takes a minute.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed
ALL := $(VENV)/.installed-all

.PHONY: demo test quick check evaluate bench gpu soak clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable .
	touch $@

$(ALL): $(STAMP)  # every extra, and what tests and checks take
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## set up, then make a video with the bundled model
	$(BIN)/slagen generate "a red circle moving right" --model tiny-wan

test: $(ALL)  ## set up, then run all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(ALL)  ## all tests but those marked slow (kills, training, compilers, kernels): under two minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

check: $(ALL)  ## lint, type-check, and look up vulnerabilities where pip-audit gets data
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/audit.py

evaluate: $(ALL)  ## the table of weights/README.md: 64 held-out prompts on the bundled weights
	$(BIN)/python scripts/tiny_wan/evaluate.py --dtype bf16

bench: $(STAMP)  ## the torch backend against dense attention on this CPU
	$(BIN)/python benchmarks/attention_cpu.py

gpu: $(ALL)  ## all that only a GPU can tell, into benchmarks/results/<card>; goes on where it was stopped
	$(BIN)/python scripts/gpu.py

# The first part, in one process, goes on where it was stopped, by .pytest_cache, as long as the code is the same.
soak: $(ALL)  ## every file operation killed and failed; batches, Ray and a finetune at random moments; every kernel compiled; 5,000 damaged files
	SLAGEN_SOAK_FAULTS=1 $(BIN)/python -m pytest tests/io/test_file_faults.py
	SLAGEN_SOAK_PROMPTS=40 SLAGEN_SOAK_KILLS=25 $(BIN)/python -m pytest tests/batch/test_batch.py tests/batch/test_ray_workers.py \
		tests/training/test_resume.py -k killed
	SLAGEN_SOAK_DAMAGED=2000 $(BIN)/python -m pytest -n 0 tests/test_damaged.py
	SLAGEN_SOAK_KERNELS=1 $(BIN)/python -m pytest tests/kernels/test_kernel_costs.py
	SLAGEN_SOAK_ARGUMENTS=1 $(BIN)/python -m pytest tests/cli/test_console.py -k every_argument
	SLAGEN_SOAK_CORRUPTIONS=300 $(BIN)/python -m pytest tests/formats/test_formats.py -k corruption
	SLAGEN_SOAK_DAMAGES=1000 $(BIN)/python -m pytest tests/formats/test_bounds.py -k damaged

clean:
	rm -rf $(VENV) build dist
