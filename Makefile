# make demo    trains a small language model with AdamW and with Sophia
# make test    runs the fast tests and the examples in the documentation
# make test-all    runs every test, compiled as users compile
# make docs    builds the documentation site into site/
# make notebook  writes and runs examples/getting_started.ipynb
# make tpu     compiles small steps for TPUs, without one; Linux on x86 only
# make accelerator    tests and times this on the GPU or TPU that is here
# make lint, make types, make package    what CI checks beside these
#
# Everything is installed into .venv; `make clean` removes it. Another
# interpreter than python3: make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ACCELERATED = sophia sophia_g hutchinson gauss_newton_bartlett microbatched \
  win_rate low_precision conformance
PYTEST = $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 \
  --dist=worksteal
BUILDIFIER ?= npx --yes @bazel/buildifier@8.2.1

.PHONY: demo test test-all tpu accelerator docs notebook format lint buildifier types completeness package clean
.NOTPARALLEL:

demo: $(VENV)/installed-examples
	$(BIN)/python examples/demo.py

# Compiling takes most of the time, and less of it without optimizations.
test: $(VENV)/installed-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=true $(PYTEST) -m 'not slow'

test-all: $(VENV)/installed-test
	$(PYTEST)

# Their compiler, libtpu, takes 0.7 GB.
tpu: $(VENV)/installed-test,tpu
	$(BIN)/python -m pytest --numprocesses=0 tests/tpu_test.py

# Install the JAX that is made for it into $(VENV) before. Other tests need
# several devices, or compare bits with those of a CPU.
accelerator: $(VENV)/installed-test
	@$(BIN)/python -c 'import sys, jax; d = jax.devices(); \
	  print(len(d), "x", d[0].device_kind); \
	  sys.exit("There is no accelerator here, or JAX is not installed for it:" \
	  " https://docs.jax.dev/en/latest/installation.html" \
	  if d[0].platform == "cpu" else None)'
	JAX_PLATFORMS= $(BIN)/python -m pytest $(ACCELERATED:%=tests/%_test.py)
	$(BIN)/python benchmarks/step_cost.py

docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build --fail-on-warning --fresh-env --nitpicky docs site

notebook: $(VENV)/installed-notebook
	$(BIN)/python docs/make_notebook.py

# `make format` writes what lint asks for.
format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# For BUILD and its likes. With one that is there already, not npm's:
# make BUILDIFIER=buildifier buildifier
buildifier:
	$(BUILDIFIER) -mode=check -lint=warn -r BUILD WORKSPACE tools/bazel

types: $(VENV)/installed-dev
	$(BIN)/mypy

# Of the public names, at least 95 % must have a known type.
completeness: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" pyright --verifytypes sophia_optax \
	  --ignoreexternal | tee /dev/stderr \
	  | awk '/^Type completeness score/ { score = $$4 + 0 } \
	    END { exit !(score >= 95) }'

package: $(VENV)/installed-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# One stamp for each extra, so that a second call installs nothing.
$(VENV)/installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) \
	  else "Python 3.11 or newer is needed; this is " + sys.version \
	  + "\nName another one: make PYTHON=python3.12")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache site dist
