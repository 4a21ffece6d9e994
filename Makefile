# Two commands do everything on a machine that has git, make and Python 3.11 or later:
#   make demo   installs, runs the main job on the mini model, shows the page
#   make test   installs, runs lint, types and the tests
# Both make .venv first and skip what is done already.

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --constraint $(CONSTRAINTS)
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
# A page is opened by people's runs only.
OPEN := $(if $(CI),,--open)

.DEFAULT_GOAL := help
.PHONY: help demo docs reports paper planted benchmark bench test test-all test-oldest check fast python

help:
	@echo "make demo      install, run the main job on the mini model (reports/mini.toml), show its page"
	@echo "make test      install, run lint, types and the fast tests"
	@echo "make test-all  the same with every test, slow ones included"
	@echo "make docs      write the reference of every module from its docstrings, offline: build/docs/index.html"
	@echo "make bench     measure how fast it is: the table of reports/performance.md, all figures in runs/bench/bench.json"
	@echo "make planted   train the planted models again (about 40 minutes on two cores) and measure them"
	@echo "make benchmark ask every localizer about the planted models, and show the page (reports/planted.toml)"
	@echo "make test-oldest  the fast tests on the oldest versions that pyproject.toml admits"
	@echo "make reports   run every reports/*.toml that needs no other checkpoints, and make its pages"
	@echo "make paper     run the paper's study (reports/paper.toml): needs a GPU and the checkpoints"
	@echo "Another interpreter: make PYTHON=python3.12 demo"

demo: $(INSTALLED)
	@failed=0; \
	$(PY) -m locogen run reports/mini.toml --keep-going --retry failed || failed=$$?; \
	$(PY) -m locogen report reports/mini $(OPEN) || failed=$$?; \
	exit $$failed

reports: $(INSTALLED)
	@set -e; for file in $(filter-out reports/paper.toml reports/planted.toml,$(wildcard reports/*.toml)); do \
		echo "$$file"; \
		$(PY) -m locogen run "$$file" --keep-going --retry failed; \
		$(PY) -m locogen report "$${file%.toml}"; \
	done

paper: $(INSTALLED)
	$(PY) -m locogen run reports/paper.toml
	$(PY) -m locogen report reports/paper $(OPEN)

# Two processes share the plants: each takes the next one that the other has not begun.
planted: $(INSTALLED_DEV)
	$(PY) -m locogen.planting.train runs/plants --threads 1 & \
	$(PY) -m locogen.planting.train runs/plants --threads 1; wait
	$(PY) -m locogen.planting.train runs/plants --into locogen/planting
	$(PY) -m locogen.planting.card

# Two processes share the questions in the same way; the notebook then reads their answers.
benchmark: $(INSTALLED_DEV)
	$(PY) tests/benchmarks/planted.py --threads 1 & \
	$(PY) tests/benchmarks/planted.py --threads 1; wait
	$(PY) -m locogen run reports/planted.toml --keep-going --retry failed
	$(PY) -m locogen report reports/planted $(OPEN)

# Files that fetch nothing: open them with a double click.
docs: $(INSTALLED_DEV)
	$(PY) -m pdoc --docformat google --output-directory build/docs \
		locogen locogen.studies.planning locogen.catalog.concepts locogen.catalog.models

test: check fast

fast: $(INSTALLED_DEV)
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile

test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt fast

test-all: check
	$(PY) -m pytest

# On a machine with nothing else to do. With nnsight in .venv (pip install nnsight) its row is measured too.
bench: $(INSTALLED_DEV)
	$(PY) tests/benchmarks/speed.py --rounds 5

check: $(INSTALLED_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath $(PY)

python:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "locogen needs Python 3.11 or later, and there is no '$(PYTHON)' here."; \
		echo "Install it, or name another interpreter: make PYTHON=python3.12 demo"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "locogen needs Python 3.11 or later; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)."; \
		echo "Name a newer interpreter: make PYTHON=python3.12 demo"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments: its venv module is missing."; \
		echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | python
	"$(PYTHON)" -m venv $(VENV)
	@echo "Installing into $(VENV): two to three minutes the first time."
	$(PIP) --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing the development tools into $(VENV)."
	$(PIP) --editable '.[dev]'
	@touch $@
