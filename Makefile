# Needs python3 (3.11 or newer) with its venv module; everything else goes into .venv.
#
#   make demo TORCH=cpu              PyTorch without CUDA, a tenth of the download; or cu126, rocm7.1, xpu, auto, ...
#   make demo PYTHON=python3.12
#   make demo PROMPT="a small green star on a white background"
#   make serve HOST=0.0.0.0 PORT=8080
#   make test ARGS="tests/test_client.py -x"
#   make test ARGS="-n 0 -s tests/test_client.py"   in one process

PYTHON  = python3
HOST    = 127.0.0.1
PORT    = 8000
PROMPT  =
ARGS    =
KILLS   = 200
UPGRADE =

UV_VERSION = 0.13.8
VENV       = .venv
BIN        = $(VENV)/bin
LOCKS      = requirements.txt requirements-dev.txt
LOCKING    = $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --quiet $(UPGRADE)
# What differs between the builds of PyTorch.
TORCH_PACKAGES = torch|torchvision|triton|nvidia-.*|cuda-.*

# The choice is kept in .venv once it has worked; "registry" is the build that the package registry has.
ifndef TORCH
TORCH := $(or $(shell cat $(VENV)/.torch 2>/dev/null),registry)
endif
INSTALLED = $(VENV)/.installed-$(TORCH)

export PROMPT
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo serve test chaos lint audit bench openapi lock wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED) ## create .venv with the pinned dependencies

demo: setup ## start the service, make one picture over HTTP, stop the service
	@echo "== demo"
	@$(BIN)/diffusion-api demo $${PROMPT:+--prompt "$$PROMPT"}

serve: setup ## run the service on http://127.0.0.1:8000
	@exec $(BIN)/diffusion-api serve --host "$(HOST)" --port "$(PORT)"

test: setup ## run the whole test suite
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: setup ## the fault tests that take long, hours in all; KILLS=20 makes them shorter
	@echo "== chaos"
	@CHAOS_KILLS=$(KILLS) $(BIN)/python -m pytest -m chaos -v -s $(ARGS)

lint: setup ## ruff and mypy
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format"
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy

audit: setup ## look for known holes: ruff's security rules and pip-audit (which asks PyPI)
	@echo "== ruff, security rules"
	@$(BIN)/ruff check --select S .
	@echo "== pip-audit"
	@$(BIN)/python scripts/audit.py

bench: setup ## measure every speed that the README names
	@for script in benchmarks/bench_*.py; do \
	    echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; \
	done

openapi: setup ## write openapi.yml, the promise to callers; ARGS=--breaking if it may break them
	@echo "== openapi.yml"
	@$(BIN)/python scripts/openapi.py $(ARGS)

lock: $(BIN)/uv ## pin the dependencies again; UPGRADE=--upgrade takes newer ones
	@echo "== lock"
	@$(LOCKING) pyproject.toml -o requirements.txt >/dev/null
	@$(LOCKING) --group dev -c requirements.txt -o requirements-dev.txt >/dev/null

wheel: setup ## build dist/*.whl
	@echo "== wheel"
	@$(BIN)/python -m hatchling build -t wheel

clean: ## remove .venv, dist and caches; models, queue and outputs stay
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find diffusion_api tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/uv: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)"; \
	    echo "Install a newer one and name it: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "== environment: $(VENV) with uv $(UV_VERSION)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "Python's venv module is not complete here. On Debian and Ubuntu install it with:"; \
	    $(PYTHON) -c 'import sys; print("    sudo apt-get install python%d.%d-venv" % sys.version_info[:2])'; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

# torch and its GPU libraries are locked as the registry has them. Other builds come from PyTorch's own index, with other
# hashes and not always in the newest version: they are installed beside the lock, up to the locked version.
$(INSTALLED): $(BIN)/uv $(LOCKS) pyproject.toml
	@case "$(TORCH)-$$(uname -s)" in \
	    registry-Linux) size="3.1 GB to download, 6 GB on disk (TORCH=cpu: 0.4 GB and 1.2 GB)";; \
	    registry-* | cpu-*) size="0.4 GB to download, 1.2 GB on disk";; \
	    *) size="2 to 4 GB to download, 4 to 8 GB on disk";; \
	esac; echo "== dependencies into $(VENV), torch from '$(TORCH)': about $$size, less what uv has in its cache"
	@rm -f $(VENV)/.installed-*
	@if [ "$(TORCH)" != "$$(cat $(VENV)/.torch 2>/dev/null)" ]; then \
	    $(BIN)/uv pip uninstall --quiet --python $(BIN)/python torch torchvision 2>/dev/null; rm -f $(VENV)/.torch; fi
ifeq ($(TORCH),registry)
	@$(BIN)/uv pip sync --python $(BIN)/python --require-hashes $(LOCKS)
else
	@awk '/^[a-z]/ {skip = $$0 ~ /^($(TORCH_PACKAGES))==/} !skip' requirements.txt >$(VENV)/requirements.txt
	@$(BIN)/uv pip sync --python $(BIN)/python --require-hashes $(VENV)/requirements.txt requirements-dev.txt
	@$(BIN)/uv pip install --python $(BIN)/python --torch-backend $(TORCH) torchvision \
	    "torch<=$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.txt)" || { \
	    echo "TORCH=$(TORCH) comes from the index of PyTorch itself, which must be reachable and must have that build."; \
	    echo "The build of the package registry needs no more than the registry: make $(or $(MAKECMDGOALS),setup) TORCH=registry"; \
	    exit 1; }
endif
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@echo "$(TORCH)" >$(VENV)/.torch
	@touch $@
