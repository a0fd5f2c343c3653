# Two commands: `make demo` and `make test`. Both make the environment in .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs/demo

.PHONY: demo test clean

demo: .venv/installed
	$(BIN)/fedgradnorm run configs/demo.toml run.dir=$(RUNS)/equal weighting.name=equal --overwrite
	$(BIN)/fedgradnorm run configs/demo.toml run.dir=$(RUNS)/fedgradnorm --overwrite
	$(BIN)/fedgradnorm report $(RUNS)/equal $(RUNS)/fedgradnorm

# One kernel thread a process: there are as many processes as cores, and some start others.
test: export OMP_NUM_THREADS = 1
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/fuzz/test_fuzz.py
	$(BIN)/pytest -n $$(($$(env -u OMP_NUM_THREADS nproc) + 1)) --dist loadgroup --ignore=tests/fuzz/test_fuzz.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
