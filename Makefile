# Every command a person or CI runs; `make` alone lists them. Long logic lives in requirements/install.py and pipelines/.
SHELL = bash -o pipefail
.SHELLFLAGS = -ec
.DEFAULT_GOAL := help

VENV ?= .venv
LOCK := requirements/cpu.lock
# Rewritten only after a complete installation, so that an interrupted one is made again.
STAMP := $(VENV)/.installed
PY := $(VENV)/bin/python
PRESET ?= zephyr
OUT ?= dice-$(PRESET).yaml
SET ?=
KEEP_S3 ?=
S3_PORT ?=

define FIND_PYTHON
found=""; for candidate in python3.11 python3.12 python3; do \
  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then found="$$candidate"; break; fi; \
done; \
if [ -z "$$found" ]; then echo "make: Python 3.11 or 3.12 is needed, neither python3.11 nor python3.12 nor python3 on the PATH is one" >&2; exit 1; fi
endef

##@ Start here

.PHONY: help
help: ## List these commands.
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } /^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## Make the virtual environment in .venv; at once when it is already there.
	@echo "installed: $(PY)"

.PHONY: demo
demo: $(STAMP) ## Align a small chat model for two iterations here. KEEP_S3=1 leaves its S3 server running, S3_PORT= sets its port.
	@exec $(PY) -m pipelines.demo $(if $(KEEP_S3),--keep-s3) $(if $(S3_PORT),--port $(S3_PORT)) $(if $(SET),--set $(SET))

.PHONY: stop-s3
stop-s3: $(STAMP) ## Stop the S3 server that KEEP_S3=1 left running.
	@exec $(PY) -m pipelines.demo --stop-s3

##@ Development

.PHONY: test
test: $(STAMP) ## Run every test that needs no GPU.
	@exec $(PY) -m pytest $(TESTS)

.PHONY: lint
lint: $(STAMP) ## Check style with ruff.
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

.PHONY: format
format: $(STAMP) ## Rewrite the sources in the project's style.
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: typecheck
typecheck: $(STAMP) ## Check the types of the pure modules with mypy.
	@$(PY) -m mypy

.PHONY: check
check: lint typecheck ## Lint and typecheck.

.PHONY: lock
lock: $(STAMP) ## Write requirements/cpu.lock from pyproject.toml; UPGRADE=1 takes the newest releases that fit.
	@links="$$($(PY) -m pip config get global.find-links 2>/dev/null || true)"; \
	$(PY) -m uv pip compile --quiet --python $(PY) --python-version 3.11 $(if $(UPGRADE),--upgrade) $${links:+--find-links $$links} \
	  --excludes requirements/excludes.txt --constraints requirements/constraints.txt --annotation-style line \
	  --custom-compile-command "make lock" \
	  --extra core --extra train --extra generate-cpu --extra pipelines --extra demo --extra test \
	  pyproject.toml --output-file $(LOCK)
	@echo "$(LOCK): $$(grep -c == $(LOCK)) packages"

##@ Pipelines

.PHONY: compile
compile: $(STAMP) ## Compile PRESET (zephyr, llama3, demo) to OUT for Kubeflow Pipelines. SET="training.learning_rate=1e-6 iterations=3".
	@$(PY) -m pipelines compile --preset $(PRESET) -o $(OUT) $(if $(SET),--set $(SET))

##@ Cleaning

.PHONY: clean
clean: ## Remove caches and build results; the environment and the demo's data stay.
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis local_outputs
	@find components dice_core pipelines tests -name __pycache__ -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: clean ## Remove the environment and the demo's data too.
	@rm -rf $(VENV) .demo

$(STAMP): $(LOCK) pyproject.toml requirements/install.py
	@$(FIND_PYTHON); "$$found" requirements/install.py $(VENV) $(LOCK)
	@touch $@
