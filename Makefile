# Two commands do everything on a fresh machine: `make study` (the main job) and `make test` (the checks).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: study test test-slow lint bench evidence clean

study: $(VENV)/.installed  ## set up, run the built-in quickstart, write report.html
	$(BIN)/downriver study --report report.html

test: $(VENV)/.installed-test  ## set up, run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.installed-test  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-dev  ## formatting, style, types, floors
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

bench: $(VENV)/.installed-test  ## every benchmark beside its peer, ratios printed
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

evidence: $(VENV)/.installed-test  ## run every reproduction and record its verdict
	for name in $$($(BIN)/python -c "from downriver.reproductions import catalogue; print(*[p.slug for p in catalogue() if p.module])"); do \
		$(BIN)/downriver reproduce $$name --record || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) report.html downriver-runs
