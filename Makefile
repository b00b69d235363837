# You and CI run the same targets. The environment is in .venv and is updated when a version changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiling every module of the packages would take a minute, and most are never imported.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed
ALL := $(VENV)/.installed-all
DOCS := build/docs-venv

.PHONY: demo test quick check evaluate bench gpu soak docs clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable .
	touch $@

$(ALL): $(STAMP)  # every extra, and what tests and checks need
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## set up, then generate a video with the bundled model
	$(BIN)/slagen generate "a red circle moving right" --model tiny-wan

test: $(ALL)  ## set up, then run all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(ALL)  ## all tests except those marked slow (kills, training, compilers, kernels): under two minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

check: $(ALL)  ## lint, check types, and look up vulnerabilities if pip-audit reaches its data
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/audit.py

evaluate: $(ALL)  ## the table of weights/README.md: 64 held-out prompts with the bundled weights
	$(BIN)/python scripts/tiny_wan/evaluate.py --dtype bf16

bench: $(STAMP)  ## the torch backend against dense attention on this CPU
	$(BIN)/python benchmarks/attention_cpu.py

gpu: $(ALL)  ## every check and measurement that needs a GPU, into benchmarks/results/<card>; run again to resume
	$(BIN)/python scripts/gpu.py

# The first part, in one process, resumes where it was stopped, from .pytest_cache, unless the code has changed.
soak: $(ALL)  ## long tests: kills and errors at every file operation, kills at random moments, every kernel, thousands of damaged files
	SLAGEN_SOAK_FAULTS=1 $(BIN)/python -m pytest tests/io/test_file_faults.py
	SLAGEN_SOAK_PROMPTS=40 SLAGEN_SOAK_KILLS=25 $(BIN)/python -m pytest tests/batch/test_batch.py tests/batch/test_ray_workers.py \
		tests/training/test_resume.py -k killed
	SLAGEN_SOAK_DAMAGED=2000 $(BIN)/python -m pytest -n 0 tests/test_damaged.py
	SLAGEN_SOAK_KERNELS=1 $(BIN)/python -m pytest tests/kernels/test_kernel_costs.py
	SLAGEN_SOAK_ARGUMENTS=1 $(BIN)/python -m pytest tests/cli/test_console.py -k every_argument
	SLAGEN_SOAK_CORRUPTIONS=300 $(BIN)/python -m pytest tests/formats/test_formats.py -k corruption
	SLAGEN_SOAK_DAMAGES=1000 $(BIN)/python -m pytest tests/formats/test_bounds.py -k damaged

$(DOCS)/.installed: pyproject.toml constraints.txt  # the extra `docs` alone: the pages are built without PyTorch
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt \
		$$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

docs: $(DOCS)/.installed  ## the pages of docs/ as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site
