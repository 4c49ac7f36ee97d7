# All targets use .venv, which the first one creates.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-oldest slow lint docs wheel release-check clean

demo: .venv/installed
	$(BIN)/python -m nat_jax.main --config=configs/digits.py

test: .venv/installed-test
	$(BIN)/pytest

# The oldest supported versions; some have no wheel for Python 3.13.
test-oldest:
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/pip install -e '.[test]' --constraint .ci/oldest.txt
	build/oldest/bin/pytest

slow: .venv/installed-test
	$(BIN)/pytest -m slow

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/make_tables.py --check

docs: .venv/installed
	$(BIN)/pip install -e '.[docs]'
	$(BIN)/sphinx-build -E -W --keep-going -n docs build/docs

wheel: .venv/installed
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

# REHEARSE=1 continues although the changelog has no date or the working tree is not clean.
release-check: .venv/installed
	$(BIN)/python .ci/release_check.py $(if $(REHEARSE),--rehearse)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -e '.[test]'
	touch $@
