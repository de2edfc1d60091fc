# make demo   sets up .venv, prepares CT volumes, pretrains, writes a report       (DATA=folder of your own NIfTI files)
# make test   sets up .venv, runs the quick tests                                  make check   lint, types, floors, slow tests
# make bench  CPU benchmark rows into benchmarks/results/                          make soak  ten minutes of the loader, memory must stay flat
# make wheels medfast_kernels as a wheel in dist/, which needs no compiler (MEDFAST_CUDA=1: with the CUDA kernels)
# make oldest the kernels' Python part on the oldest torch that the package index has for Python 3.11

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?=
RUN    := runs/demo

# glibc hands big temporaries back to the kernel after each operator; keeping them halves a CPU step (README, Speed)
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 1073741824

.PHONY: demo test check lint bench soak wheels oldest clean

$(VENV)/.core: requirements/cpu.txt pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/cpu.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core requirements/dev.txt requirements/peers.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/peers.txt
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
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --hypothesis-profile=repeatable -m "not slow" tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint
	$(BIN)/python -m pytest -q tests

bench: $(VENV)/.dev
	$(BIN)/medfast bench kernels
	$(BIN)/medfast bench architectures
	$(BIN)/medfast bench data

soak: $(VENV)/.dev
	$(BIN)/python benchmarks/soak.py --minutes 10

wheels: $(VENV)/.core
	rm -rf kernels/build
	MEDFAST_EXT=1 $(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist ./kernels
	rm -rf kernels/build kernels/*.egg-info

OLDEST := $(CURDIR)/build/oldest
oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check torch==1.13.0 "numpy<2" pytest hypothesis
	cd tests/kernels && MEDFAST_BACKEND= PYTHONPATH=../../kernels $(OLDEST)/bin/python -m pytest -q -c /dev/null \
		--rootdir=. -p no:cacheprovider --import-mode=importlib -k "not compile and not copy_nothing and not lengths_are" test_window.py \
		test_random.py test_masking.py test_class_token.py test_contrast.py test_tokens.py test_dispatch.py

clean:
	rm -rf $(VENV) build dist runs *.egg-info kernels/build kernels/*.egg-info kernels/medfast_kernels/*.so
