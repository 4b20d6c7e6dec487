# The environment is .venv; every target makes it first. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
SGLANG := sglang==0.5.23
# trl, verl: functions that tests compare ours with; docker-compose: the compose specification
READ_BY_TESTS := trl==1.16.0 verl==0.9.1 docker-compose==1.29.2
# of `make test`; 2: one runs what needs a server, the other the rest, which takes a machine of four
# cores, since some tests allow only so many seconds
WORKERS ?= 0
PIP := $(BIN)/pip --disable-pip-version-check install

.PHONY: help venv demo test test-fast check format fuzz soak mutations bench learn dist docs clean
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

venv: .venv/.ready ## everything into .venv (once)
.venv/.ready: pyproject.toml requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ead needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@if nvidia-smi -L >/dev/null 2>&1 || test -e /dev/kfd; then \
	  echo "==> GPU found: SGLang with its own CUDA packages (about 11 GB)" && \
	  $(PIP) -e '.[server,trainer,dev]'; \
	else \
	  echo "==> no GPU found: the CPU set-up (see requirements-cpu.txt)" && \
	  echo "==> 1/4 torch" && $(PIP) torch==2.13.0 && \
	  echo "==> 2/4 SGLang" && $(PIP) --no-deps $(SGLANG) torchvision==0.28.0 && \
	  echo "==> 3/4 what SGLang needs on a CPU" && $(PIP) -r requirements-cpu.txt && \
	  echo "==> 4/4 this project" && $(PIP) -e '.[trainer,dev]'; \
	fi
	@echo "==> wheels that tests read (3 MB, not installed)" && \
	  rm -rf .venv/wheels && \
	  $(BIN)/pip --disable-pip-version-check download -q --no-deps -d .venv/wheels $(READ_BY_TESTS)
	@touch $@

# other people's clients, for their examples' tests alone: they want another openai than SGLang
.venv/clients/.ready: examples/clients/requirements.txt | .venv/.ready
	$(PYTHON) -m venv .venv/clients
	.venv/clients/bin/pip --disable-pip-version-check install -q -r $<
	@touch $@

demo: venv ## serve, chat, train, and one picture of it
	@$(BIN)/ead demo
test: export EAD_NO_SKIPS = 1
test: check .venv/clients/.ready ## format, lint and types, then all tests, most on a real server
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-fast: venv ## the tests that need no server: minutes
	@$(BIN)/python -m pytest -m "not server"

check: venv ## format, lint, types, imports, and whether the client's sync form is up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python scripts/unasync.py --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: venv ## rewrite the code in the project's format, and the client's sync form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python scripts/unasync.py

fuzz: venv ## more than 10,000 requests that nobody would send; SEED=1, 2, ... are others
	@EAD_FUZZ_SCALE=4 EAD_FUZZ_SEED=$(or $(SEED),1) $(BIN)/python -m pytest -s tests/server/test_fuzz.py

soak: venv ## 10 minutes of all kinds of requests, then every way of dying: about an hour
	@$(BIN)/python -m benchmarks.soak

mutations: venv ## break a line of the mathematics at a time: do tests notice? ONLY="3 17": some
	@$(BIN)/python tests/mutations.py $(ONLY)

bench: venv ## the whole server's speed against plain SGLang
	@$(BIN)/python -m benchmarks.decode

learn: venv ## GRPO on a small task, with EAD and without: does the reward rise?
	@$(BIN)/python -m benchmarks.learn

dist: venv ## a wheel, in dist/
	@$(BIN)/pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist . && ls dist/*.whl

docs: venv ## the documentation into site/, its curves made first
	@mkdir -p docs/img
	@$(BIN)/ead schedule paper --step 0 --step 10 --step 40 --length 400 --out docs/img/ead.svg
	@$(BIN)/ead schedule recipe paper --length 1000 --out docs/img/presets.svg
	@$(BIN)/ead schedule paper reverse linear cosine two_stage --step 10 --out docs/img/kinds.svg
	@$(BIN)/mkdocs build --quiet --strict

clean: ## remove .venv
	rm -rf .venv
