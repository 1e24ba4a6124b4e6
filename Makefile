# `make demo` and `make test` need Python 3.11 or later and nothing else: they install into .venv and run there.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# of the programs in benchmarks/: that what they use of the package is there
UNCHECKED := arg-type assignment call-arg call-overload import-untyped index misc unused-ignore
KERNELS := setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: demo lint test docs figures gpu-compile
.NOTPARALLEL:

demo: .venv/demo.stamp
	$(BIN)/dit-accel demo --out demo-out $(ARGS)

# what takes a minute: before every commit
lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=benchmarks:tests $(BIN)/mypy --follow-imports silent $(UNCHECKED:%=--disable-error-code %) benchmarks/*.py

test: lint
	$(BIN)/pytest tests -n auto --dist worksteal --matrix docs/models.md

# the site, into site/; a warning is an error
docs: .venv/test.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# every table and picture that README and docs show: hours on two cores; FIGURES="step quality" makes some
figures: .venv/test.stamp
	$(BIN)/python benchmarks/figures.py $(FIGURES)

# what CI compiles of the GPU kernels, and the page of it: half an hour on two cores, less where Triton's cache has some of it
gpu-compile: .venv/test.stamp
	.ci/aot --page

# the stamps: nothing is installed again until what is to be installed changes
.venv/demo.stamp: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	touch $@ .venv/demo.stamp

$(BIN)/pip:
	$(PYTHON) -m venv .venv
