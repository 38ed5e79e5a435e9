# Two commands do everything: `make demo` and `make test`. Both set up .venv first, once.
# PYTHON=python3.12 chooses the interpreter; ARGS="-k softmax" goes to pytest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
comma := ,

VENV ?= .venv
PY := $(VENV)/bin/python
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(GPU),torch>=2.11$(comma)<2.15,torch==2.13.0)
TRITON ?= triton==3.7.1
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
FOLDERS := memplan passes codegen reports
TYPINGS := build/typings

NOTEBOOKS ?= build/notebooks

.PHONY: help demo test notebooks-test lint types wheel wheel-test clean
help:
	@echo "make demo    compile and train a GPT-2, check it against eager, print its memory report"
	@echo "make test    all tests (ARGS=... goes to pytest)"
	@echo "make notebooks-test   the view in JupyterLab and marimo (needs Chromium, node, npm)"
	@echo "make lint | types | wheel | wheel-test"

demo: $(VENV)/.demo
	$(PY) examples/demo.py

test: $(VENV)/.test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# JupyterLab and marimo in an environment of their own, which borrows torch and memplan from ours
notebooks-test: $(VENV)/.test $(NOTEBOOKS)/.ready
	MEMPLAN_NOTEBOOKS=$(abspath $(NOTEBOOKS))/bin/python NODE_PATH=$(abspath $(NOTEBOOKS))/node_modules \
		$(PY) -m pytest tests/reports/test_notebooks.py -rs $(ARGS)

# installed before it borrows: what ours has would count as installed, and anywidget's part for JupyterLab be missing
$(NOTEBOOKS)/.ready: | $(VENV)/.test
	$(PY) -c 'import sys, venv; venv.create(sys.argv[1], with_pip=True)' $(NOTEBOOKS)
	$(NOTEBOOKS)/bin/python -m pip install --quiet --disable-pip-version-check jupyterlab ipykernel marimo anywidget
	site=$$($(NOTEBOOKS)/bin/python -c 'import site; print(site.getsitepackages()[0])') \
	&& $(PY) -c 'import site; print(f"import site; list(map(site.addsitedir, {site.getsitepackages()!r}))")' > "$$site/ours.pth"
	npm install --silent --no-save --prefix $(NOTEBOOKS) playwright-core
	touch $@

lint: $(VENV)/.dev
	$(PY) -m ruff check .

# mypy does not follow setuptools' package-dir: a folder of links shows it the names that memplan installs under
types: $(VENV)/.dev
	rm -rf $(TYPINGS) && mkdir -p $(TYPINGS)/memplan
	for path in memplan/*; do ln -s "../../../$$path" "$(TYPINGS)/$$path"; done
	for name in passes codegen reports; do ln -s "../../../$$name" "$(TYPINGS)/memplan/$$name"; done
	cd $(TYPINGS) && $(abspath $(PY)) -m mypy --config-file $(abspath pyproject.toml) \
		--cache-dir $(abspath .mypy_cache) -p memplan

wheel: $(VENV)/.dev
	rm -rf dist build/lib build/bdist.*
	$(PY) -m build --quiet --wheel --no-isolation --outdir dist .
	rm -rf *.egg-info  # or the next `make test` takes it for the installed package

# The wheel alone, from a folder where the checkout cannot be imported
wheel-test: wheel
	rm -rf build/outside && mkdir -p build/outside
	outside=$$(mktemp -d) && trap 'rm -rf "$$outside"' EXIT \
	&& $(PY) -m venv --without-pip "$$outside/env" \
	&& site=$$("$$outside/env/bin/python" -c 'import site; print(site.getsitepackages()[0])') \
	&& $(PY) -m pip install --quiet --no-deps --target "$$site" dist/memplan-*.whl \
	&& $(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$site/dependencies.pth" \
	&& cp -r tests benchmarks "$$outside" && cd "$$outside" \
	&& printf '[pytest]\naddopts = --import-mode=importlib -q\npythonpath = .\n' > pytest.ini \
	&& env/bin/python -c "import memplan.reports as m, sys; assert m.__file__.startswith(sys.prefix), m.__file__" \
	&& OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} env/bin/python -m pytest -p no:cacheprovider \
		tests/test_packaging.py tests/ir tests/models/test_programs.py \
		-k "not models or convolutions or retain_graph or dynamic_batch or graph_breaks or option"

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

# -- the environment: each stamp is made again only when what it depends on changed ---------------------------------

# The first Python that runs (a shim of a version that is not there does not). One that already has torch lends it.
$(VENV)/.created:
	python="$(PYTHON)"; \
	for name in $${python:-python3.11 python3.12 python3.13 python3}; do \
		if "$$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
		then found="$$name"; break; fi; \
	done; \
	[ -n "$${found:-}" ] || { echo "memplan needs Python 3.11, 3.12 or 3.13 with venv; set PYTHON=..." >&2; exit 1; }; \
	lend=$$("$$found" -c 'import importlib.util as u; print("--system-site-packages" if u.find_spec("torch") else "")'); \
	[ -x "$(PY)" ] || "$$found" -m venv $$lend $(VENV)
	touch $@

# torch is installed only where there is none
$(VENV)/.torch: $(VENV)/.created
	$(PY) -c 'import torch' 2>/dev/null || $(INSTALL) '$(TORCH)'
	touch $@

$(VENV)/.memplan: $(VENV)/.torch pyproject.toml
	$(PY) -c 'import wheel, setuptools as s; assert int(s.__version__.split(".")[0]) >= 69' 2>/dev/null \
		|| $(INSTALL) 'setuptools>=69' wheel
	$(INSTALL) --no-build-isolation -e .
	touch $@

$(VENV)/.demo: $(VENV)/.memplan
	$(PY) -c 'import transformers' 2>/dev/null || $(INSTALL) 'transformers>=5'
	touch $@

# Triton compiles for a GPU without one; its interpreter runs kernels on a CPU
$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --no-build-isolation -e '.[test]'
	$(PY) -c 'import triton' 2>/dev/null || $(INSTALL) '$(TRITON)'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@
