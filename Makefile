# Everything sets itself up: `make demo` and `make test` need Python 3.11 or newer, make and git, and nothing else.
#
#   PYTHON=python3.12       the Python to build .venv with         (default: the first that is new enough)
#   TORCH_INDEX=URL         where PyTorch's wheels are looked for  (default: PyTorch's CPU builds, where there is no
#                           NVIDIA driver; an index that you set is used either way; empty: pip's own configuration)
#   WORKERS=4               parallel test processes                (default: 2)

VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2

TORCH_INDEX_IS := $(origin TORCH_INDEX)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint format docs clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.ready ## see it work: installs what is needed, then `seriatim demo`
	$(RUN) -m seriatim demo

test: lint ## format, lint, types, the laws and the tests: under 10 minutes
	OMP_NUM_THREADS=1 $(RUN) -m seriatim laws --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)

test-all: lint docs ## the same with the slow tests, and the documentation
	OMP_NUM_THREADS=1 $(RUN) -m seriatim laws --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) -m "" --timeout 1800

lint: $(VENV)/.ready-dev ## format, lint and types, without changing a file
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy

format: $(VENV)/.ready-dev ## format and mend what can be mended
	$(RUN) -m ruff check --fix-only
	$(RUN) -m ruff format

docs: $(VENV)/.ready-docs ## build the documentation into site/
	$(RUN) -m mkdocs build --strict --quiet
	@echo "Open site/index.html"

clean: ## remove .venv and whatever else was made here
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- setting up: a stamp file for each set of dependencies, so that a second call costs nothing ---------------------

$(VENV)/.ready: pyproject.toml constraints.txt
	@sh -euc "$$SETUP" setup .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt
	@sh -euc "$$SETUP" setup ".[dev]"
	@touch $(VENV)/.ready $@

$(VENV)/.ready-docs: pyproject.toml constraints.txt
	@sh -euc "$$SETUP" setup ".[docs]"
	@touch $(VENV)/.ready $@

define SETUP
# Any Python that truly runs (a pyenv shim may stand in PATH and fail), tested versions before newer ones.
find_python() {
    for newest in 13 99; do
        for candidate in $${PYTHON:-python3 python3.13 python3.12 python3.11}; do
            if "$$candidate" -c "import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $$newest))" 2>/dev/null; then
                echo "$$candidate"; return
            fi
        done
    done
}
# The alarm also ends a look-up of the name that hangs, which the time-out of a socket does not.
answers() {
    $(RUN) - "$$1" 2>/dev/null <<'END'
import os, signal, ssl, sys, urllib.request
signal.alarm(10)
tls = ssl.create_default_context()
if os.environ.get("PIP_CERT"):
    tls.load_verify_locations(os.environ["PIP_CERT"])
urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=5, context=tls)
END
}
if ! $(RUN) -m pip --version >/dev/null 2>&1; then
    python=$$(find_python)
    if [ -z "$$python" ]; then
        echo "No Python 3.11 or newer with venv was found$${PYTHON:+ as $$PYTHON}." >&2
        echo "Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3.12 ..." >&2
        exit 1
    fi
    echo "Making $(VENV) with $$($$python --version)."
    "$$python" -m venv --clear $(VENV)
fi
index=
if [ "$(TORCH_INDEX_IS)" = undefined ] && nvidia-smi >/dev/null 2>&1; then
    echo "NVIDIA driver found: PyTorch comes from where pip is configured to look."
elif [ -z "$(TORCH_INDEX)" ]; then
    echo "PyTorch comes from where pip is configured to look."
elif answers "$(TORCH_INDEX)"; then
    echo "PyTorch comes from $(TORCH_INDEX)."
    index="--extra-index-url $(TORCH_INDEX)"
else
    echo "$(TORCH_INDEX) does not answer: PyTorch comes from where pip is configured to look (from PyPI, it may be the build for NVIDIA: several GB)."
fi
echo "Installing $$1 with the versions in constraints.txt: a minute or two, and about 200 MB of PyTorch the first time."
$(RUN) -m pip install --disable-pip-version-check $(if $(CI),--quiet) $$index -c constraints.txt -e "$$1"
endef
export SETUP
