# Two commands for a new user: `make quickstart` and `make test`; `make docs` builds the pages, `make panel` trains the
# policy of two hundred tasks. All they need is Python 3.11, git and make.
PYTHON ?= python3
WORKDIR ?= runs/quickstart
# Further flags of the quickstart, for example FLAGS=--preset=smoke; and options of pytest, for example PYTEST="-k scores".
FLAGS ?=
PYTEST ?=

VENV := .venv
BIN := $(VENV)/bin
# Where the wheel is built and installed, apart from the checkout.
DIST := build/dist
INSTALLED := build/installed
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: quickstart panel test docs lint clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/python -m experiments.quickstart --workdir=$(WORKDIR) $(FLAGS)

# From the references in data/zoo to a report, in hours; goes on where it was.
panel: $(VENV)/.installed-panel
	$(BIN)/python -m experiments.panel --workdir=runs/panel200 $(FLAGS)

# Tests see the package as a user gets it: the wheel is installed into an environment of its own, which borrows its
# dependencies from $(VENV), and PYTHONSAFEPATH keeps the checkout's folders off the path, in subprocesses too. Each worker
# gets tests that stand together, which share fixtures, and takes some of the other's at the end.
test: lint
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(DIST) .
	$(BIN)/python -m venv --without-pip $(INSTALLED)
	$(BIN)/pip --python $(INSTALLED)/bin/python install --quiet --no-deps --no-index $(DIST)/*.whl
	$(BIN)/python -c '$(PURELIB)' > "$$($(INSTALLED)/bin/python -c '$(PURELIB)')/dependencies.pth"
	PYTHONSAFEPATH=1 LDM_JAX_TESTS_INSTALLED=1 $(INSTALLED)/bin/python -m pytest -q -n 2 \
	  --dist=worksteal --durations=10 $(PYTEST)

# Notebooks are run first: pages show what this version prints and draws. NOTEBOOKS names some of them alone, `none` none:
# pages then show what was run last or is stored. LINKS=--external asks for links that leave the site too.
NOTEBOOKS ?=
LINKS ?=
SITE := build/docs/site
docs: $(VENV)/.installed-docs
	test "$(NOTEBOOKS)" = none || $(BIN)/python docs/execute.py $(NOTEBOOKS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python docs/links.py $(SITE) $(LINKS)
	@echo "the pages are in $(SITE)/index.html; $(BIN)/mkdocs serve shows them while you write"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One stamp for each set of extras: installed again only when what it depends on has changed.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "$(PYTHON) is missing or older than Python 3.11; name another one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
	  "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
