# Every target sets up what it needs in .venv first; a second call starts at once.
# Options: PYTHON=python3.12   PIP_ARGS="..." (to pip install)   DEMO_ARGS="..."   LAB_ARGS="..."   PYTEST_ARGS="..."   MATRIX_ARGS="..."   BENCH_ARGS="..."

SHELL  := /bin/sh
BIN    := .venv/bin
PY     := $(BIN)/python
PIP_ARGS ?=
DEMO_ARGS ?= --html artefacts/demo.html
LAB_ARGS ?=
PYTEST_ARGS ?=
MATRIX_ARGS ?=
BENCH_ARGS ?=
comma  := ,

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help demo lab test test-full test-rest lint matrix oldest bench bench-readme clean venv setup-notebook setup-lab setup-test browser
.NOTPARALLEL:

help: ## this list
	@grep -E '^[a-z-]+:.* ## ' $(MAKEFILE_LIST) | sed 's/:.* ## /|/' | while IFS='|' read -r t d; do printf '  make %-10s %s\n' "$$t" "$$d"; done

demo: setup-notebook ## two engines, a small model in two halves, hooks, a report, and a page to look at
	@$(BIN)/flexmagic demo $(DEMO_ARGS)

lab: setup-lab ## JupyterLab with the demo notebooks
	@$(BIN)/flexmagic kernel install --sys-prefix
	@$(BIN)/jupyter lab $$([ "$$(id -u)" = 0 ] && echo --allow-root) $(LAB_ARGS) demo_notebooks

test: setup-test browser ## lint and the whole suite, except what is marked slow or full
	@failed=0; $(MAKE) --no-print-directory run-lint || failed=1; \
	$(BIN)/pytest $(PYTEST_ARGS) || failed=1; exit $$failed

test-full: test test-rest ## `make test`, then the tests marked slow or full

test-rest: setup-test browser
	@status=0; $(BIN)/pytest -m "slow or full" $(PYTEST_ARGS) || status=$$?; \
	if [ $$status = 5 ]; then echo "No test is marked slow or full yet."; status=0; fi; exit $$status

lint: setup-test run-lint ## ruff and mypy

.PHONY: run-lint
run-lint:
	@failed=0; \
	$(BIN)/ruff check --quiet . || failed=1; \
	$(BIN)/ruff format --quiet --check --output-format concise . || { echo "Not formatted: run $(BIN)/ruff format"; failed=1; }; \
	$(BIN)/mypy --no-error-summary || failed=1; \
	[ $$failed = 0 ] && echo "lint: clean" || echo "lint: failed"; exit $$failed

matrix: setup-test ## measure what is whole under which distribution, and write it into the README
	@cd tests && ../$(BIN)/python -m engines.matrix.freeze $(MATRIX_ARGS)

# An environment of its own, made once: .venv-oldest.
oldest: ## the core of that table against the oldest transformers that this works with
	@[ -e .venv-oldest/.made ] || { echo "Set-up: making .venv-oldest (a few minutes: it waits for downloads)"; \
	  $(or $(PYTHON),python3) -m venv --clear .venv-oldest && \
	  .venv-oldest/bin/python -m pip install --quiet --progress-bar off "transformers==5.19.*" -e ".[test]" $(PIP_ARGS) </dev/null && \
	  touch .venv-oldest/.made; }
	@.venv-oldest/bin/python -m pytest tests/engines/matrix tests/engines/test_main_job.py $(PYTEST_ARGS)

# An environment of its own with what is compared, made once: .venv-bench. FlexModel pins nothing that it needs here.
bench: ## measure what flexmagic costs beside plain hooks, NNsight, FlexModel and others (a quarter of an hour; BENCH_ARGS="--rows cd")
	@[ -e .venv-bench/.made ] || { echo "Set-up: making .venv-bench (some minutes: it waits for downloads)"; \
	  $(or $(PYTHON),python3) -m venv --clear .venv-bench && \
	  .venv-bench/bin/python -m pip install --quiet --progress-bar off -e . "transformers>=5.19,<5.23" "nnsight==0.8.1" pyvene transformer_lens $(PIP_ARGS) </dev/null && \
	  .venv-bench/bin/python -m pip install --quiet --progress-bar off --no-deps "flex-model==0.1.0" $(PIP_ARGS) </dev/null && \
	  touch .venv-bench/.made; }
	@cd tests/benchmarks && ../../.venv-bench/bin/python -m suite --json ../../artefacts/speed.json $(BENCH_ARGS)

bench-readme: ## write the last measurement's table and chart into the README
	@cd tests/benchmarks && ../../.venv-bench/bin/python -m suite.chart ../../artefacts/speed.json

clean: ## remove what tests and builds left behind (.venv stays; remove it by hand)
	@rm -rf build dist artefacts .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info kernel/*.egg-info
	@find flexmagic kernel tests demo_notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# --- set-up -------------------------------------------------------------------------------------------

# .venv.creating stands while .venv is being made: found later, it means that .venv is only half there.
venv:
	@if [ ! -e .venv.creating ] && $(PY) -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	found=; for p in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	  if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$p; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "flexmagic needs Python 3.11 or newer with its venv module; $(or $(PYTHON),python3) is none. Install one, or say make PYTHON=/path/to/python3." >&2; exit 2; fi; \
	echo "Set-up: making .venv with $$found (a few seconds)"; \
	touch .venv.creating && $$found -m venv --clear .venv && rm .venv.creating

# $(call install,EXTRA,WIDER,WHAT): install this package with an extra, unless it or one that contains it is there.
# The stamp holds what it was made from. .venv/.installing stands while pip runs: found later, pip was cut short, and
# packages it left half-written are made unknown to it (it would take them for installed), so that it writes them again.
define install
@key="$$(cksum < pyproject.toml) $(CURDIR)"; log=.venv/install-$(1).log; \
for extra in $(1) $(2); do [ "$$(cat .venv/.installed-$$extra 2>/dev/null)" = "$$key" ] && exit 0; done; \
if [ -e .venv/.installing ]; then echo "Set-up: the last one was cut short; checking what it left"; $(PY) -c "$$FORGET_HALF_WRITTEN" || exit 1; fi; \
echo "Set-up: installing flexmagic with $(3) (a few minutes the first time: it waits for downloads; log: $$log)"; \
rm -f .venv/.installed-*; touch .venv/.installing; \
if $(PY) -m pip install --quiet --progress-bar off -e ".[$(1)]" $(PIP_ARGS) </dev/null >$$log 2>&1; then \
  rm .venv/.installing; echo "$$key" >.venv/.stamp && mv .venv/.stamp .venv/.installed-$(1); \
else \
  echo "Set-up: pip failed; the end of $$log:" >&2; tail -n 15 $$log >&2; exit 1; \
fi
endef

define FORGET_HALF_WRITTEN
import csv, pathlib, shutil, sysconfig
site = pathlib.Path(sysconfig.get_path('purelib'))
def whole(info):
    record = info / 'RECORD'
    if not record.is_file() or not (info / 'INSTALLER').is_file():
        return False
    for name, _, size in csv.reader(record.open(encoding='utf-8', newline='')):
        path = site / name
        if size and (not path.is_file() or path.stat().st_size != int(size)):
            return False
    return True
for info in site.glob('*.dist-info'):
    if not whole(info):
        shutil.rmtree(info)
for left in site.glob('~*'):
    shutil.rmtree(left) if left.is_dir() else left.unlink()
endef
export FORGET_HALF_WRITTEN

setup-notebook: venv
	$(call install,notebook,lab test,torch$(comma) transformers$(comma) ipyparallel and nbconvert)

setup-lab: venv
	$(call install,lab,test,torch$(comma) transformers$(comma) ipyparallel and JupyterLab)

setup-test: venv
	$(call install,test,,all that its tests need)

# Tried once per .venv; never a reason to fail.
browser:
	@has() { command -v "$$1" >/dev/null 2>&1; }; \
	ready() { { has chromium || has chromium-browser || has google-chrome; } && has chromedriver; }; \
	ready && exit 0; \
	root=; [ "$$(id -u)" = 0 ] || root="sudo -n"; log=.venv/install-browser.log; \
	if [ ! -e .venv/.browser-tried ] && has apt-get && { [ -z "$$root" ] || $$root true >/dev/null 2>&1; }; then \
	  echo "Set-up: installing Chromium and its driver with apt-get (a minute or two; log: $$log)"; \
	  { DEBIAN_FRONTEND=noninteractive $$root apt-get -q update && \
	    DEBIAN_FRONTEND=noninteractive $$root apt-get -q install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core; } \
	    </dev/null >$$log 2>&1; touch .venv/.browser-tried; \
	fi; \
	ready || echo "Chromium or chromedriver is missing: the browser tests will be skipped. To have them: apt-get install chromium chromium-driver"
