# make demo   the main job on a real slide, into demo_output/
# make test   the whole test suite, in WORKERS processes (2); make test-fast   without what takes long
# make notebooks   all notebooks, top to bottom; SAVE=1 writes their outputs back
# make models-report   the figures of the demo models' cards; SAVE=1 writes data/models/measures.json
# make docs   the documentation site, into docs/_build/html
# All make the virtual environment .venv first, where it is not there yet. Nothing else needs to be installed.

SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
DOCS := $(VENV)/.docs
WORKERS := 2

.PHONY: demo test test-fast notebooks models-report lint docs install clean clean-demo
.DELETE_ON_ERROR:

demo: $(READY)
	@$(PYTHON) -m demo

test: $(READY)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(READY)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

notebooks: $(READY)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON) -m pytest --nbmake --nbmake-timeout=600 $(if $(SAVE),--overwrite) $(or $(ONLY),notebooks)
	$(if $(SAVE),$(PYTHON) docs/tidy_notebooks.py && $(PYTHON) docs/pictures.py)

models-report: $(READY)
	$(PYTHON) benchmarks/models_report.py $(if $(SAVE),--save)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

docs: $(DOCS)
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo 'open docs/_build/html/index.html'

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@for candidate in $(FROM) python3.12 python3.11 python3.13 python3 python; do \
	  if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'error: no Python 3.11 or newer with venv was found. Install one (Debian, Ubuntu: apt install python3-venv),' >&2; \
	  echo 'or name it: make $(MAKECMDGOALS) FROM=/path/to/python3' >&2; exit 1; fi; \
	echo "setting up $(VENV) with $$($$found --version): a few minutes, once"; \
	[ -x $(PYTHON) ] && $(PYTHON) -c '' 2>/dev/null || $$found -m venv --clear $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

$(DOCS): $(READY)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[docs]' --constraint constraints.txt
	@touch $@

clean-demo:
	rm -rf demo_output

clean: clean-demo
	rm -rf $(VENV) docs/_build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
