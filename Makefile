# `make` lists the rules. Everything runs in .venv, which the first rule that needs it creates;
# with PY=3.13 (or 3.12) in that Python's own .venv-3.13.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-versions test-full test-launch lint bench gpu lock clean

PY :=
PY_ALL := 3.12 3.13
VENV := .venv$(if $(PY),-$(PY))
PYTHON_VENV := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SHELL_SCRIPTS := .ci/run $(wildcard tools/*.sh docker/*.sh tests/launch/*.sh examples/launch/*.s*)
# Two test processes share the cores, and so do the two ranks of a launch: one thread each.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg

help: ## list the rules
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1 \2/p' Makefile | \
		while read -r rule what; do printf '  make %-12s %s\n' "$$rule" "$$what"; done

$(STAMP): requirements/dev.txt pyproject.toml tools/bootstrap.sh
	@tools/bootstrap.sh $(PY)
	@touch $@

venv: $(STAMP) ## create or update .venv (PY=3.13: .venv-3.13) from the lock

quickstart: $(STAMP) ## train an 8-expert Default MoE on this machine's CPU (no GPU needed)
	@$(PYTHON_VENV) tools/quickstart.py

test: $(STAMP) ## every test that needs no GPU, without the long ones
	$(TEST_ENV) $(PYTHON_VENV) -m pytest -n 2 --dist loadgroup --ignore=tests/distributed
	@if [ -d tests/distributed ]; then set -x; \
		$(TEST_ENV) $(PYTHON_VENV) -m pytest tests/distributed; fi

test-versions: ## make test on every supported Python, each in an environment of its own
	@for version in $(PY_ALL); do $(MAKE) --no-print-directory venv PY=$$version; done
	@for version in $(PY_ALL); do $(MAKE) --no-print-directory test PY=$$version; done

test-full: $(STAMP) ## every test, the long ones included
	$(TEST_ENV) $(PYTHON_VENV) -m pytest -m "" -n 2 --dist loadgroup --ignore=tests/distributed
	@if [ -d tests/distributed ]; then set -x; \
		$(TEST_ENV) $(PYTHON_VENV) -m pytest -m "" tests/distributed; fi

test-launch: $(STAMP) ## run the launchers, on two hosts and on a SLURM of its own (as root)
	@tests/launch/run.sh

lint: $(STAMP) ## ruff (lint and format), mypy, shellcheck, hadolint
	$(PYTHON_VENV) -m ruff check
	$(PYTHON_VENV) -m ruff format --check
	$(PYTHON_VENV) -m mypy
	$(VENV)/bin/shellcheck $(SHELL_SCRIPTS)
	$(VENV)/bin/hadolint Dockerfile

bench: $(STAMP) ## measure the overhead against TopK and write docs/results/
	$(PYTHON_VENV) bench/overhead.py

gpu: ## on a machine with a GPU, test and measure everything there (PYTHON= MINUTES= OUT=DIR)
	$(or $(PYTHON),python3) bench/gpu.py --minutes $(or $(MINUTES),9) $(if $(OUT),--out "$(OUT)")

lock: ## resolve requirements/*.in anew into requirements/*.txt
	@tools/bootstrap.sh lock

clean: ## remove the environments, .uv and the caches (runs/ stays)
	rm -rf .venv .venv-* .uv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
