# `make demo` opens the lab, `make test` runs the suite; both install into VENV first, and say what they do.
# `make reproduce` runs every recipe at `small`, `make bench` every benchmark; a stopped run goes on where it was.
#   PYTHON=python3.12        which Python makes the environment (3.11 or newer)
#   VENV=path                another environment, for example one that has a CUDA build of torch: it is kept as it is
#   PIP_ARGS="--index-url …" where torch comes from, see README
#   EXTRAS=dev,ray           more extras for what the tests else skip
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
EXTRAS ?= dev
ARGS ?=
PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check
LATEST = $(VENV)/.hf_ext

.DEFAULT_GOAL := help
.PHONY: help demo test bench reproduce style quality clean

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

demo: $(LATEST)-demo
	@echo "== preparing SmolLM2 (93 MB are fetched the first time)"
	@$(PY) -c "from hf_ext import tiny; print('SmolLM2:', tiny.path('smollm2'))" \
		|| echo "SmolLM2 could not be prepared (see above): the lab opens without it and says what to do."
	@echo "== opening the lab"
	@$(PY) spaces/lab/app.py $(ARGS)

test: $(LATEST)-$(EXTRAS)
	@echo "== running the tests"
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

reproduce: $(LATEST)-$(EXTRAS)
	@$(PY) -m trainers.recipes --all $(ARGS) && $(PY) model_cards/render.py && cat model_cards/results/results.md

bench: $(LATEST)-$(EXTRAS)
	@$(PY) -m tests.benchmarks --all $(ARGS) && $(PY) model_cards/render.py && cat model_cards/results/results.md

style: $(LATEST)-$(EXTRAS)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

quality: $(LATEST)-$(EXTRAS)
	@echo "== ruff, mypy, import rules"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports .importlinter

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "hf_ext needs Python 3.11 or newer, and $(PYTHON) is not: name one with PYTHON=python3.12"; exit 1; }
	@echo "== making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "No environment could be made: on Debian, apt install python3-venv"; exit 1; }

# torch comes alone and first, from what pip is set up to offer; one that is there already is never replaced
$(LATEST)-torch: | $(PY)
	@if $(PY) -c 'import torch' 2>/dev/null; then echo "== keeping the torch that is installed"; \
	else echo "== installing torch"; $(PIP) install $(PIP_ARGS) -c constraints.txt torch \
		|| { echo "torch could not be installed: check the network, or name an index with PIP_ARGS (README, Install)"; exit 1; }; fi
	@{ grep -v '^torch==' constraints.txt; $(PY) -c 'import torch; print("torch==" + torch.__version__)'; } > $@.part
	@mv $@.part $@

$(LATEST)-%: pyproject.toml constraints.txt | $(LATEST)-torch
	@echo "== installing hf_ext with its extra '$*'"
	@$(PIP) install -c $(LATEST)-torch -e ".[$*]" \
		|| { echo "hf_ext could not be installed: check the network and the lines above, then run make again"; exit 1; }
	@touch $@
