# Two commands: `make demo` shows the whole system, `make test` checks it. Everything else is `rsir` or nbdev.
SHELL  := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV   ?= .venv
# The torch the project was last tested with. Another: `make test TORCH="torch>=2.6"`.
TORCH  ?= torch==2.13.0
# Processes that run pages and tests at a time, with one thread each.
WORKERS ?= 2
BIN    := $(VENV)/bin
export WANDB_MODE ?= offline
export MPLBACKEND ?= agg
# Threads that wait sleep instead of spinning: beside other work two OpenMP threads lose most of their time otherwise.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test dev check notebooks pytest run readme pages site docs screenshots clean

demo: $(VENV)/.installed
	$(BIN)/rsir demo

test: $(VENV)/.installed-dev check notebooks pytest

# Exports and notebooks agree, notebooks are clean, the linter is content.
check: $(VENV)/.installed-dev
	$(BIN)/python tests/check_export.py
	$(BIN)/ruff check rsir_nb nbs tests benchmarks setup.py

notebooks: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_test --n_workers $(WORKERS) --timing

pytest: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile

# Execute one page and keep its outputs: make run PAGE=20_models.patches
run: $(VENV)/.installed-dev
	$(BIN)/python tests/run_page.py nbs/$(PAGE).ipynb

dev: $(VENV)/.installed-dev
	$(BIN)/nbdev_install_hooks
	git rev-parse --git-dir >/dev/null && $(BIN)/pre-commit install

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rsir_nb needs Python 3.11 or newer; PYTHON=/path/to/it make ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python settings.ini setup.py
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" -e ".[dev]"
	touch $@

clean:
	rm -rf _docs _proc build dist *.egg-info

# README.md from the home page, nbs/index.ipynb.
readme: $(VENV)/.installed-dev
	$(BIN)/python tests/make_readme.py

# What is made from the pages: README.md, and the lists of nbs/book.md and nbs/api.md.
pages: readme
	$(BIN)/python tests/make_pages.py

# The processed pages that Quarto would read, and whether their links, pictures, fences and sidebar are in order.
site: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_proc_nbs
	$(BIN)/python tests/check_site.py _proc

# The whole site, where Quarto is. nbdev writes a README of its own, with other links, unless ours is newer than the home page.
docs: $(VENV)/.installed-dev
	touch README.md
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_docs

# The pictures of the gallery in nbs/images, from JupyterLab in a browser; look at them before they are committed.
screenshots: $(VENV)/.installed-dev
	$(BIN)/python tests/make_screenshots.py
