# `make demo` and `make test` need Python 3.11 or newer, make, and a package index; nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The tests start commands by the hundred, which without byte code compile every module anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint check faults format extras clean
.DEFAULT_GOAL := test

demo: $(VENV)/installed
	@exec $(BIN)/poolsweep demo

test: lint check

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

# The tests wait more than they work: four at once, even on two cores.
check: $(VENV)/installed
	$(BIN)/pytest -rs --numprocesses 4 --dist worksteal

# A thousand faults on purpose, in ten minutes or so; what it prints replays an episode.
faults: $(VENV)/installed
	$(BIN)/pytest tests/faults/test_episodes.py -k great_many --faults 1000 --capture no

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What some tests want besides and are skipped without: Chromium, and promtool. For root on Debian.
extras:
	@{ command -v chromium && command -v promtool; } >/dev/null || { \
		test "$$(id -u)" = 0 && apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq -y --no-install-recommends chromium prometheus; } >/dev/null 2>&1 || \
		echo "Chromium or promtool is not there: the tests that want them are skipped." >&2

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Debian splits ensurepip off into python3-venv; where that is missing it is installed, as root, or
# asked for in a sentence.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -qq -y python3-venv && \
		$(PYTHON) -m venv --clear $(VENV); } || { \
		echo "Install Python's venv module first: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
