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
# An environment is ready for these lists, this checkout and this index.
LISTS := $(shell (cat pyproject.toml constraints.txt; echo "$(CURDIR) $(TORCH_INDEX)") | cksum | cut -d' ' -f1)
READY := $(PREFIX)/.nt-utils-$(LISTS)

.PHONY: study plan test lab browser figures publish reproduce docs report bench bench-gpu lint clean help env env-test env-dev env-browser

study: env ## run the study: executed notebooks, tables and figures in runs/<study>/seed-<seed>/
	@$(BIN)/python -m nt_utils.study.batch study --studies "$(STUDY)" --seeds "$(SEEDS)" --preset "$(PRESET)" --cores "$(CORES)"

plan: env ## what the study will do, need and take, and what is missing; loads no weights
	@$(BIN)/python -m nt_utils.study.plan --studies "$(STUDY)" --seeds "$(SEEDS)" --preset "$(PRESET)"

test: env-test ## run the tests
	@$(BIN)/python -m pytest

lab: env ## open the notebooks in JupyterLab, at their index
	@$(BIN)/python -m jupyterlab --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/index.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

browser: env-browser ## run the notebooks in JupyterLab in a real browser (needs chromium), open the report, and check what they show
	@$(BIN)/python -m tests.browser

figures: env ## redraw every figure in figures/ from its table
	@$(BIN)/python -m nt_utils.plots figures --width "$(WIDTH)"

publish: PRESET = full
publish: env ## collect the runs' claims, figures and executed notebooks into figures/, notebooks/executed/, docs/ and README.md
	@$(BIN)/python -m nt_utils.study.publish --studies "$(STUDY)" --seeds "$(SEEDS)" --preset "$(PRESET)"

docs: env-dev ## build the pages of docs/ into build/site, with their links checked
	@$(BIN)/python -m nt_utils.study.docs && $(BIN)/mkdocs build --strict --quiet

reproduce: CORES = 1
reproduce: env ## rerun a published study into runs/reproduce/ and compare its tables and verdicts with the published ones
	@$(BIN)/python -m nt_utils.study.reproduce --study "$(STUDY)" --cores "$(CORES)"

report: env ## one self-contained HTML of an executed study: runs/<study>/seed-<seed>/report.html
	@$(BIN)/python -m nt_utils.study.report --studies "$(STUDY)" --seeds "$(SEEDS)" --preset "$(PRESET)"

bench: env ## measure speed and memory against the plain forward pass
	@$(BIN)/python -m nt_utils.bench

bench-gpu: env ## the same on a GPU, at the shapes of 7B and 14B models
	@$(BIN)/python -m nt_utils.bench --gpu

lint: env-dev ## check format, lint, types and stripped notebooks
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/nbstripout --verify notebooks/*.ipynb

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
	@bash .ci/setup.sh "$(ENV)" "$(PREFIX)" "$(PYTHON)" "$(TORCH_INDEX)" "" && touch $@

$(READY)-test: $(READY)
	@bash .ci/setup.sh "$(ENV)" "$(PREFIX)" "$(PYTHON)" "$(TORCH_INDEX)" "[test]" && touch $@

$(READY)-dev: $(READY)
	@bash .ci/setup.sh "$(ENV)" "$(PREFIX)" "$(PYTHON)" "$(TORCH_INDEX)" "[dev]" && touch $@

$(READY)-browser: $(READY)
	@bash .ci/setup.sh "$(ENV)" "$(PREFIX)" "$(PYTHON)" "$(TORCH_INDEX)" "[browser]" && touch $@
