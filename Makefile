# The commands of this repository; `make` alone lists them.
#   make PYTHON=python3.12 ...   another interpreter to build the environment from
#   make VENV=/path/to/env ...   an environment you already have, used as it is
#   make JOBS=8 test             more processes for the tests
#   make ASK=--quick bench       options of bench/run.py
#   make SLICE=20 bakeoff        minutes after which the bake-off saves its work and ends
.DEFAULT_GOAL := help
.PHONY: help repro verify smoke test test-long bench bakeoff lab check record clean given
.SUFFIXES:
unexport PYTHONHOME PYTHONPATH IN_TEST

PYTHON ?= python3
SLICE ?= 60
JOBS ?= 2
VENV := build/venv
BIN := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
HERE := PATH="$(BIN):$$PATH" PYTHONPATH="$(CURDIR)"
RUN := $(HERE) "$(BIN)/python"
MINIMUM := $(shell sed -n 's/^min_python *= *//p' settings.ini)

# The environment is made once, and again when the requirements or the place of the clone change.
KEY := $(shell { cat settings.ini requirements.lock; pwd; } | cksum | cut -d ' ' -f 1)
ENV := $(if $(filter build/venv,$(VENV)),$(VENV)/.ready-$(KEY),given)

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

repro: $(ENV) data ## rebuild all of results/: images, pretraining, evaluation, figures
	@$(RUN) .ci/mend.py
	@$(RUN) -m dvc repro

verify: $(ENV) ## rebuild the last commit in build/verify and compare it with the committed results
	@$(RUN) -m clmae verify

smoke: $(ENV) data ## the whole pipeline, tiny, in a minute and a half, in build/smoke
	@$(RUN) .ci/smoke.py

test: $(ENV) data ## the whole test suite: pytest, then every notebook from top to bottom
	@status=0; \
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile || status=1; \
	echo "Every notebook, from top to bottom:"; \
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(HERE) nbdev_test --n_workers $(JOBS) --timing || status=1; \
	exit $$status

test-long: $(ENV) ## the tests that kill a run at many random moments
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m long

bench: build/bench-venv/.ready-$(KEY) ## time our training steps beside other libraries', part by part, and reading; into results/bench
	@PATH="$(CURDIR)/build/bench-venv/bin:$$PATH" PYTHONPATH="$(CURDIR)" build/bench-venv/bin/python -m bench.run $(ASK)
	@PATH="$(CURDIR)/build/bench-venv/bin:$$PATH" PYTHONPATH="$(CURDIR)" build/bench-venv/bin/python -m bench.input $(filter --quick,$(ASK))
	@PATH="$(CURDIR)/build/bench-venv/bin:$$PATH" PYTHONPATH="$(CURDIR)" build/bench-venv/bin/python -m bench.ladder $(filter --quick,$(ASK))

bakeoff: $(ENV) build/prepared ## compare the methods: what is missing of nbs/20_bakeoff, for at most an hour
	@OMP_NUM_THREADS=1 $(RUN) -m clmae bakeoff --minutes $(SLICE)

build/prepared: | $(ENV) data
	@$(RUN) -m dvc repro prepare

lab: $(ENV) ## open the notebooks in JupyterLab
	@$(RUN) -m jupyterlab nbs

check: $(ENV) ## notebooks clean and in step with clmae/, style, direction of imports, README in sync
	@$(RUN) .ci/check.py

record: $(ENV) ## refresh what depends on the machine: times of the last runs, CPU, versions
	@$(RUN) .ci/record.py

clean: ## remove build/ (all but build/venv) and tools' caches; never data/ or results/
	@if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name venv -exec rm -rf {} +; fi
	@rm -rf .pytest_cache .ruff_cache .hypothesis _proc
	@find clmae tests nbs bench .ci -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

data: | $(ENV)
	@$(RUN) -m dvc pull data

given:
	@"$(BIN)/python" -c 'from importlib.metadata import version as v; [v(p) for p in "clmae dvc papermill nbdev pytest ruff".split()]' 2>/dev/null \
	|| { echo "clmae: VENV=$(VENV) lacks what the commands need; run: $(BIN)/python -m pip install -c requirements.lock -e '.[repro,dev]'" >&2; exit 1; }

build/venv/.ready-$(KEY): INSTALL := -e '.[repro,dev]'
build/bench-venv/.ready-$(KEY): INSTALL := -e . -r bench/requirements.txt
build/bench-venv/.ready-$(KEY): bench/requirements.txt
build/venv/.ready-$(KEY) build/bench-venv/.ready-$(KEY):
	@command -v "$(PYTHON)" >/dev/null \
	|| { echo "clmae: $(PYTHON) not found; install Python $(MINIMUM) or newer (Debian/Ubuntu: sudo apt install python3 python3-venv)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MINIMUM)".split("."))))' \
	|| { echo "clmae: Python $(MINIMUM) or newer is needed, $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name another one: make PYTHON=python$(MINIMUM)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	|| { echo "clmae: $(PYTHON) cannot make environments; install the package python3-venv (Debian/Ubuntu: sudo apt install python$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv)" >&2; exit 1; }
	@echo "Making the environment in $(@D): once, some minutes, about 6 GB."
	@"$(PYTHON)" -m venv --clear $(@D)
	@if [ -t 1 ]; then quiet=; else quiet=-q; fi; \
	PYTHONWARNINGS=ignore $(@D)/bin/python -m pip install $$quiet \
		--disable-pip-version-check --no-input -c requirements.lock $(INSTALL)
	@touch "$@"
