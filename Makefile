# make demo   sets up .venv, prepares CT volumes, pretrains, writes a report       (DATA=folder of your own NIfTI files)
# make test   sets up .venv, runs the quick tests                                  make check   lint, types, floors, slow tests
# make bench  CPU benchmark rows into benchmarks/results/

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?=
RUN    := runs/demo

# glibc hands big temporaries back to the kernel after each operator; keeping them halves a CPU step (README, Speed)
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824

.PHONY: demo test check lint bench clean

$(VENV)/.core: requirements/cpu.txt pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/cpu.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core requirements/dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/dev.txt
	touch $@

demo: $(VENV)/.core
	@rm -rf $(RUN)
	@mkdir -p $(RUN)
	@set -e; input="$(DATA)"; \
	if [ -z "$$input" ] && [ -d ../shared/data/ct ]; then input=../shared/data/ct; fi; \
	if [ -z "$$input" ]; then input=$(RUN)/phantoms; $(BIN)/medfast data phantoms $$input; fi; \
	$(BIN)/medfast data prepare "$$input" --store $(RUN)/store --max-bad 1
	@$(BIN)/medfast pretrain configs/demo.yaml data.store=$(RUN)/store out=$(RUN)/run
	@$(BIN)/medfast report $(RUN)/run
	@echo "store: $(CURDIR)/$(RUN)/store"
	@echo "run:   $(CURDIR)/$(RUN)/run"
	@echo "open:  $(CURDIR)/$(RUN)/run/report/index.html"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint
	$(BIN)/python -m pytest -q tests

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/window_attention.py

clean:
	rm -rf $(VENV) build dist runs *.egg-info kernels/*.egg-info kernels/medfast_kernels/*.so
