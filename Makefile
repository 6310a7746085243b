# make study   set everything up and run the whole study
# make help    all targets and variables

SHELL := /bin/bash
.DEFAULT_GOAL := help

ENV ?= .venv# .venv, or "current": the active conda or virtual environment
PYTHON ?= python3# the Python that makes the .venv
TORCH_INDEX ?=# PyTorch's wheel index, e.g. https://download.pytorch.org/whl/cpu or .../whl/cu128; empty: PyPI
STUDY ?= testbed# one or more of notebooks/params/*.yaml
SEEDS ?= 0# one or more seeds
PRESET ?= default# quick, default or full
CORES ?= all# cores of the whole study
WIDTH ?= text# of figures: text, column or slide

export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

ifeq ($(ENV),current)
  PREFIX := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
else
  PREFIX := $(ENV)
endif
BIN := $(PREFIX)/bin
PY := "$(BIN)/python"
# An environment is ready for these lists, this checkout and this index.
LISTS := $(shell (cat pyproject.toml constraints.txt; pwd; echo '$(TORCH_INDEX)') | cksum | cut -d' ' -f1)
BLANK := $(subst ,, )
READY := $(subst $(BLANK),\$(BLANK),$(PREFIX))/.nt-utils-$(LISTS)

.PHONY: study plan test test-real test-cpus testbed lab browser figures publish reproduce docs report bench bench-gpu lint clean help env env-test env-dev env-browser

study: env ## run the study: executed notebooks, tables and figures in runs/<study>/seed-<seed>/
	@$(PY) -m nt_utils.study.batch study --studies "$(STUDY)" --seeds "$(SEEDS)" --preset "$(PRESET)" --cores "$(CORES)"

plan: env ## what the study will do, need and take, and what is missing; loads no weights
	@$(PY) -m nt_utils.study.plan --studies "$(STUDY)" --seeds "$(SEEDS)" --preset "$(PRESET)"

test: env-test ## run the tests
	@$(PY) -m pytest

test-real: env-test ## check file, template, scores and hooks on Qwen2.5-Coder-0.5B itself; downloads .5 GB
	@NT_TEST_REAL=1 HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-0} $(PY) -m pytest tests/real

test-cpus: env-test ## run the tests with every set of instructions that this CPU offers, and with one and two threads
	@$(PY) -m tests.cpus

testbed: env ## train the testbed of SEEDS anew, into the cache, and compare its gate with the shipped one's
	@for seed in $(SEEDS); do $(PY) -m nt_utils.testbed train --seed "$$seed" || exit 1; done

lab: env ## open the notebooks in JupyterLab, at their index
	@$(PY) -m jupyterlab --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/index.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

browser: env-browser ## run the notebooks in JupyterLab in a real browser (needs chromium), open the report, and check what they show
	@$(PY) -m tests.browser

figures: env ## redraw every figure in figures/ from its table
	@$(PY) -m nt_utils.plots figures --width "$(WIDTH)"

publish: env ## collect the runs' claims, figures and executed notebooks into figures/, notebooks/executed/, docs/ and README.md
	@$(PY) -m nt_utils.study.publish --studies "$(STUDY)" --seeds "$(SEEDS)" --preset "$(PRESET)"

docs: env-dev ## build the pages of docs/ into build/site, with their links checked
	@$(PY) -m nt_utils.study.docs && $(PY) -m mkdocs build --strict --quiet

reproduce: CORES = 1
reproduce: env ## rerun a published study into runs/reproduce/ and compare its tables and verdicts with the published ones (one notebook at a time unless CORES is given)
	@$(PY) -m nt_utils.study.reproduce --study "$(STUDY)" --cores "$(CORES)"

report: env ## one self-contained HTML of an executed study: runs/<study>/seed-<seed>/report.html
	@$(PY) -m nt_utils.study.report --studies "$(STUDY)" --seeds "$(SEEDS)" --preset "$(PRESET)"

bench: env ## measure speed and memory against the plain forward pass
	@$(PY) -m nt_utils.bench

bench-gpu: env ## the same on a GPU, at the shapes of 7B and 14B models
	@$(PY) -m nt_utils.bench --gpu

lint: env-dev ## check format, lint, types and stripped notebooks
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy && $(PY) -m nbstripout --verify notebooks/*.ipynb

clean: ## remove the .venv and build leftovers; runs/ and the cache stay
	rm -rf .venv build *.egg-info .snakemake .pytest_cache .ruff_cache .mypy_cache

help: ## show this
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; echo "Variables (make study SEEDS=\"0 1 2\" PRESET=quick):"
	@awk -F' *\\?= *|# ' '/^[A-Z_]+ \?=/ {printf "  %-12s %-10s %s\n", $$1, $$2, $$3}' $(MAKEFILE_LIST)

env: $(READY)
env-test: $(READY)-test
env-dev: $(READY)-dev
env-browser: $(READY)-browser

$(READY):
	@bash .ci/setup.sh "$(ENV)" "$(PREFIX)" "$(PYTHON)" "$(TORCH_INDEX)" "" && touch "$@"

$(READY)-test: $(READY)
	@bash .ci/setup.sh "$(ENV)" "$(PREFIX)" "$(PYTHON)" "$(TORCH_INDEX)" "[test]" && touch "$@"

$(READY)-dev: $(READY)
	@bash .ci/setup.sh "$(ENV)" "$(PREFIX)" "$(PYTHON)" "$(TORCH_INDEX)" "[dev]" && touch "$@"

$(READY)-browser: $(READY)
	@bash .ci/setup.sh "$(ENV)" "$(PREFIX)" "$(PYTHON)" "$(TORCH_INDEX)" "[browser]" && touch "$@"
