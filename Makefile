# Two commands are all one needs: `make serve` and `make test`. Each installs what it needs first,
# once, into .venv; a changed lock file installs again. `make help` lists the rest.

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
BENCH := .venv-bench/.installed

# The first interpreter that is new enough. Looked for only when something must be installed.
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done),python3)

.PHONY: help serve test test-long fuzz lint types format format-check pictures bench-flat bench-memory bench-tuning bench-remote \
	bench-engine bench-engine-kill bench-engine-warm bench-librechat soak clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' Makefile | awk -F'  ' '{ printf "make %-20s%s\n", $$1, $$2 }'

serve: $(RUNTIME) ## run chatfold; flags: make serve ARGS="--port 9000 --n-ctx 4096"
	@exec $(BIN)/chatfold serve $(ARGS)

test: $(DEV) $(BENCH) ## run the tests; flags: make test ARGS="-k sse -x"
	@$(BIN)/python scripts/install_node.py
	$(BIN)/python -m pytest $(ARGS)

test-long: $(DEV) $(BENCH) ## run the few tests that take long
	$(BIN)/python -m pytest -m long $(ARGS)

EXAMPLES ?= 1000
fuzz: $(DEV) ## schemathesis against the published API: no server error; make fuzz EXAMPLES=100
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/e2e/test_fuzz.py $(ARGS)

lint: $(DEV) ## ruff's checks
	$(BIN)/ruff check .

types: $(DEV) ## mypy, strict
	$(BIN)/mypy

format: $(DEV) ## lay out the code
	$(BIN)/ruff format .

format-check: $(DEV) ## is the code laid out?
	$(BIN)/ruff format --check .

pictures: $(DEV) ## the pages' pictures in docs/, from a chat made anew; needs Chromium
	$(BIN)/python -m tests.pages.pictures

bench-flat: $(DEV) $(BENCH) ## the 60-turn chat beside the bare server: table, JSON, plot
	$(BIN)/python -m bench.flat $(ARGS)

bench-remote: $(DEV) $(BENCH) ## chatfold before other servers: what it adds, 60 turns, the original user's case
	$(BIN)/python -m bench.remote_latency
	$(BIN)/python -m bench.remote_flat
	$(BIN)/python -m bench.remote_case --anew

bench-memory: $(DEV) ## what memory promises, in figures, without a model: tables, JSON
	$(BIN)/python -m bench.memory $(ARGS)

bench-librechat: $(DEV) ## what LibreChat's clients get: URLs, titles, sliding windows, Stop, 40 turns of its own; JSON
	@$(BIN)/python scripts/install_node.py
	$(BIN)/python -m bench.librechat $(ARGS)

bench-tuning: $(DEV) ## is what chatfold tune foretells what happens? and all presets on LoCoMo
	$(BIN)/python -m bench.tuning $(ARGS)

bench-engine: $(DEV) ## what the embedded engine promises, beside llama_cpp.Llama: tables, JSON
	$(BIN)/python -m bench.engine $(ARGS)

bench-engine-kill: $(DEV) ## kill -9 of the model process, 50 times under load
	$(BIN)/python -m bench.engine_kill $(ARGS)

bench-engine-warm: $(DEV) ## whatever happened to the cache before, the same answers: 300 cases
	$(BIN)/python -m bench.engine_warm $(ARGS)

SECONDS ?= 3600
soak: $(DEV) ## an hour of mixed load: does anything grow? make soak SECONDS=600
	$(BIN)/python -m bench.engine_soak --seconds $(SECONDS) $(ARGS)

clean: ## remove caches and build outputs; .venv stays, it took ten minutes
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(RUNTIME): requirements-build.lock requirements.lock requirements-model.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo 'chatfold: Python 3.11 or newer is needed, as python3 or with make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) scripts/install.py runtime
	@touch $@

$(DEV): requirements-dev.lock $(RUNTIME)
	@$(BIN)/python scripts/install.py dev
	@touch $@

$(BENCH): requirements-bench.lock $(RUNTIME)
	@$(BIN)/python scripts/install.py bench
	@touch $@
