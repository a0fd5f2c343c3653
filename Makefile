# Two commands: `make demo` and `make test`. Both make the environment in .venv first, once.

PYTHON ?= python3
PYTHONS ?= python3.11 python3.12 python3.13
BIN := .venv/bin
RUNS ?= runs/demo

.PHONY: demo test test-matrix clean

demo: .venv/installed
	$(BIN)/fedgradnorm run configs/demo.toml run.dir=$(RUNS)/equal weighting.name=equal --overwrite
	$(BIN)/fedgradnorm run configs/demo.toml run.dir=$(RUNS)/fedgradnorm --overwrite
	$(BIN)/fedgradnorm report $(RUNS)/equal $(RUNS)/fedgradnorm

# The checks of the code run beside the tests, and what they say is shown after them. One kernel
# thread a process: there are more processes than cores, and some start others and wait for them.
test: export OMP_NUM_THREADS = 1
test: .venv/installed
	@said=$$(mktemp); trap 'rm -f "$$said"' EXIT; failed=0; \
	{ $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy; } >"$$said" 2>&1 & \
	$(BIN)/pytest -n $$(($$(env -u OMP_NUM_THREADS nproc) + 1)) --dist loadgroup || failed=$$?; \
	wait $$! || failed=$$?; \
	cat "$$said"; exit $$failed

# The tests on every Python, and with the lowest versions that pyproject.toml states: an environment
# of several GB each, in .venv-matrix/. Some packages for tests have no wheel for every Python.
test-matrix: export OMP_NUM_THREADS = 1
test-matrix:
	@failed=; \
	for python in $(PYTHONS); do \
	    $(MAKE) --no-print-directory test-with PYTHON=$$python NAME=$${python##*/} \
	        PINS=constraints.txt || failed="$$failed $$python"; \
	done; \
	$(MAKE) --no-print-directory test-with PYTHON=$(firstword $(PYTHONS)) NAME=lowest \
	    PINS=constraints-lowest.txt || failed="$$failed lowest"; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

.PHONY: test-with
test-with:
	$(PYTHON) -m venv .venv-matrix/$(NAME)
	PIP_CONSTRAINT=$(CURDIR)/$(PINS) .venv-matrix/$(NAME)/bin/pip install --disable-pip-version-check -q -e '.[dev]'
	.venv-matrix/$(NAME)/bin/pytest -q -n $$(env -u OMP_NUM_THREADS nproc) --dist loadgroup -m 'not deployment' \
	    --ignore=tests/docs

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --disable-pip-version-check -q -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-matrix
