# Every command a person or CI runs; `make` alone lists them. Long logic lives in requirements/install.py and pipelines/.
SHELL = bash -o pipefail
.SHELLFLAGS = -ec
.DEFAULT_GOAL := help

VENV ?= .venv
LOCK := requirements/cpu.lock
# The same with CUDA's builds of torch and vLLM, for a machine with a GPU, in an environment of its own.
GPU_LOCK := requirements/gpu.lock
GPU_VENV := .venv-gpu
# Of programs that do not fit into it: AlpacaEval, and what serves the curves, each in an environment of its own.
ALPACA_LOCK := requirements/alpaca.lock
BOARD_LOCK := requirements/board.lock
BOARD := .cache/board
# Rewritten only after a complete installation, so that an interrupted one is made again.
STAMP := $(VENV)/.installed
PY := $(VENV)/bin/python
PRESET ?= zephyr
OUT ?= dice-$(PRESET).yaml
SET ?=
KEEP_S3 ?=
S3_PORT ?=
BENCH ?=
GPU ?=
# An interpreter that has the packages already: nothing is installed then.
GPU_PYTHON ?=

# Images: where they go, their tag (the last commit that changed what is in them: a tag names the sources, not the accelerator or the build arguments), and
# what builds them.
REGISTRY ?= dice-suite
IMAGE_SOURCES := .dockerignore LICENSE components dice_core images/Dockerfile pipelines pyproject.toml requirements
IMAGE_COMMIT = git log -1 --format=$(1) --abbrev=12 -- $(IMAGE_SOURCES) 2>/dev/null
TAG ?= $(or $(shell $(call IMAGE_COMMIT,%h)),untracked)$(shell test -z "$$(git status --porcelain -- $(IMAGE_SOURCES) 2>/dev/null)" || echo -dirty)
# docker, podman or buildah
BUILDER ?= docker
# gpu: core, generate and train; cpu: one image with all three names
ACCELERATOR ?= gpu
# For a base image of your own, with its digest if you pin by it, and another package index.
BASE_IMAGE ?=
INDEX_URL ?=
BUILD_FLAGS ?=
IMAGE_NAMES := core generate train
IMAGE_ARGS = --build-arg VERSION=$(TAG) --build-arg REVISION=$$($(call IMAGE_COMMIT,%H)) \
  $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(if $(INDEX_URL),--build-arg INDEX_URL=$(INDEX_URL)) \
  $(if $(EFA_INSTALLER),--build-arg EFA_INSTALLER=$(EFA_INSTALLER)) $(BUILD_FLAGS) --file images/Dockerfile

# The cluster: which overlay of manifests/, and the releases that manifests/README.md tells of.
# kind, a100 or kueue; to deploy one it must be named
OVERLAY ?=
# a context of your kubeconfig; empty: the current one
CONTEXT ?=
KUBECTL = kubectl $(if $(CONTEXT),--context $(CONTEXT))
KIND_CLUSTER ?= dice
KFP_VERSION ?= 2.17.0
TRAINING_OPERATOR_VERSION ?= v1.9.3

# Runs on the cluster: KFP_HOST, DICE_ROOT and DICE_NAMESPACE are read from the environment.
RUN ?=
PORT ?=
NAME ?=
TASK ?=
TAIL ?=
RAW ?=
FORCE ?=
CRON ?=
EVERY ?=
PROMPTS ?=
WAIT ?=
DRY_RUN ?=
POLICY ?=
REASON ?=
PRICE ?=
MODEL_CONFIG ?=
RESPONSE_TOKENS ?=
JSON ?=
TO ?=
CLUSTER_OPTIONS = $(if $(CONTEXT),--context "$(CONTEXT)")
# The shell takes SET from the environment, so that the quotes of JSON in it stay; `set -f` before it keeps its brackets.
SET_OPTION = $(if $(SET),--set $$SET)
PIPELINE_OPTIONS = $(CLUSTER_OPTIONS) --preset "$(PRESET)" $(SET_OPTION)
# $(call on,WAIT): WAIT=0 is off as well as none at all.
on = $(filter-out 0,$($(1)))

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
	@set -f; exec $(PY) -m pipelines.demo $(if $(call on,KEEP_S3),--keep-s3) $(if $(S3_PORT),--port "$(S3_PORT)") $(SET_OPTION)

.PHONY: stop-s3
stop-s3: $(STAMP) ## Stop the S3 server that KEEP_S3=1 left running.
	@exec $(PY) -m pipelines.demo --stop-s3

##@ Development

.PHONY: test
test: $(STAMP) ## Run every test, the fast ones first; those for a GPU where there is one.
	@$(PY) -m pytest --durations=15 --durations-min=15 $(TESTS)
	@! ls /dev/nvidia[0-9]* >/dev/null 2>&1 || $(PY) -m pytest -m gpu $(TESTS) || test $$? -eq 5  # 5: none is among TESTS

.PHONY: test-fast
test-fast: $(STAMP) ## Run the tests that take no real model, engine or server: two minutes on 2 cores.
	@exec $(PY) -m pytest -m "not slow" $(TESTS)

# It fails without a GPU, for whoever asks for it wants to see one; `make test` leaves out what needs one, and says so.
.PHONY: test-gpu
test-gpu: ## Show on this machine's GPU, in ten minutes, that attention, ZeRO-3, vLLM and checkpoints are right, and how fast. GPU="--section attention" runs a part.
	@ls /dev/nvidia[0-9]* >/dev/null 2>&1 || { echo "make: left out: all, no CUDA device here (no /dev/nvidia0)" >&2; exit 1; }
	@$(if $(GPU_PYTHON),,$(MAKE) --no-print-directory VENV=$(GPU_VENV) LOCK=$(GPU_LOCK) install)
	@exec $(or $(GPU_PYTHON),$(GPU_VENV)/bin/python) -m tests.gpu $(GPU)

.PHONY: bench
bench: $(STAMP) ## Compare ours with each peer's way; takes an hour or two on a quiet machine. BENCH="--stage pair" runs a part.
	@$(PY) -m uv pip install --quiet --no-deps --target .cache/benchmarks/packages -r tests/benchmarks/requirements.txt \
	  || echo "make: TRL cannot be installed here, its rows are left out" >&2
	@exec $(PY) -m tests.benchmarks $(if $(BENCH),$(BENCH),--out tests/benchmarks)

.PHONY: lint
lint: $(STAMP) ## Check style with ruff.
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

.PHONY: format
format: $(STAMP) ## Rewrite the sources in the project's style.
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: typecheck
typecheck: $(STAMP) ## Check the types of dice_core, components and pipelines with mypy.
	@$(PY) -m mypy

.PHONY: check
check: lint typecheck ## Lint and typecheck: what CI runs before the tests.

.PHONY: lock
lock: $(STAMP) ## Write requirements/cpu.lock from pyproject.toml, and those of make test-gpu, AlpacaEval, make board and the tests' trackers; UPGRADE=1 takes the newest releases that fit.
	@links="$$($(PY) -m pip config get global.find-links 2>/dev/null || true)"; \
	$(PY) -m uv pip compile --quiet --python $(PY) --python-version 3.11 $(if $(call on,UPGRADE),--upgrade) $${links:+--find-links $$links} \
	  --excludes requirements/excludes.txt --constraints requirements/constraints.txt --annotation-style line \
	  --custom-compile-command "make lock" \
	  --extra core --extra train --extra generate-cpu --extra pipelines --extra demo --extra test \
	  pyproject.toml --output-file $(LOCK)
	@compile="$(PY) -m uv pip compile --quiet --python-version 3.11 $(if $(call on,UPGRADE),--upgrade) --annotation-style line"; \
	export UV_CUSTOM_COMPILE_COMMAND="make lock"; \
	for name in mlflow wandb; do echo $$name | $$compile - --output-file tests/$$name.lock; done; \
	echo tensorboard | $$compile --constraints requirements/constraints.txt - --output-file $(BOARD_LOCK); \
	$$compile --constraints requirements/constraints.txt --extra alpaca pyproject.toml --output-file $(ALPACA_LOCK); \
	$$compile --constraints requirements/constraints.txt --constraints requirements/generate-gpu.lock \
	  --excludes requirements/gpu-excludes.txt --python-platform x86_64-manylinux_2_28 \
	  --extra core --extra train --extra qlora --extra generate --extra pipelines --extra demo --extra test \
	  pyproject.toml --output-file $(GPU_LOCK)
	@echo "$(LOCK): $$(grep -c == $(LOCK)) packages"

##@ Pipelines

.PHONY: compile
compile: $(STAMP) ## Compile PRESET (zephyr, llama3, llama3-70b, zephyr-offline, demo) to OUT for Kubeflow Pipelines. SET="training.learning_rate=1e-6 iterations=3".
	@set -f; exec $(PY) -m pipelines compile --preset "$(PRESET)" -o "$(OUT)" $(SET_OPTION)

.PHONY: settings
settings: $(STAMP) ## List every setting of PRESET: its value, what is allowed, and what it means.
	@set -f; exec $(PY) -m pipelines settings --preset "$(PRESET)" $(SET_OPTION)

.PHONY: plan
plan: $(STAMP) ## Tell what a run of PRESET takes: memory, disk, S3, tokens, hours, and at PRICE= (a GPU hour) its cost. MODEL_CONFIG=, RUN=, RESPONSE_TOKENS=, JSON=1.
	@set -f; exec $(PY) -m pipelines plan --preset "$(PRESET)" $(SET_OPTION) $(if $(PRICE),--price "$(PRICE)") $(if $(RUN),--run "$(RUN)") \
	  $(if $(MODEL_CONFIG),--model-config "$(MODEL_CONFIG)") $(if $(RESPONSE_TOKENS),--response-tokens "$(RESPONSE_TOKENS)") $(if $(call on,JSON),--json)

# A pipeline names the images that `make images` builds.
compile submit schedule preflight: export DICE_REGISTRY = $(REGISTRY)
compile submit schedule preflight: export DICE_TAG = $(TAG)

##@ Images

.PHONY: images
images: ## Build the images as REGISTRY/dice-NAME:TAG (the commit). BUILDER=docker|podman|buildah, ACCELERATOR=cpu for kind, BASE_IMAGE=, INDEX_URL=, EFA_INSTALLER=.
ifeq ($(ACCELERATOR),cpu)
	@$(BUILDER) build $(IMAGE_ARGS) --target cpu $(IMAGE_NAMES:%=--tag $(REGISTRY)/dice-%:$(TAG)) .
else
	@for name in $(IMAGE_NAMES); do \
	  target=$$name; if [ $$name = train ]; then target=train$(if $(EFA_INSTALLER),-efa); fi; \
	  $(BUILDER) build $(IMAGE_ARGS) --target $$target --tag $(REGISTRY)/dice-$$name:$(TAG) .; \
	done
endif
	@echo "built: $(IMAGE_NAMES:%=$(REGISTRY)/dice-%:$(TAG))"

.PHONY: push
push: ## Push the images to REGISTRY; refuses a tag that does not say what is in them.
	@case "$(TAG)" in \
	  latest|untracked|*-dirty) echo "make: TAG=$(TAG) does not say what is in the images: commit first, or give TAG= a name that you use once" >&2; exit 1;; \
	esac
	@registry="$(REGISTRY)"; case "$${registry%%/*}" in \
	  localhost|*[.:]*) ;; \
	  *) echo "make: REGISTRY=$(REGISTRY) names no host, and would be pushed to Docker Hub: give REGISTRY=registry.example.com/dice (docker.io/... for Docker Hub)" >&2; exit 1;; \
	esac
	@for name in $(IMAGE_NAMES); do $(BUILDER) push $(REGISTRY)/dice-$$name:$(TAG); done

.PHONY: lock-images
lock-images: $(STAMP) ## Write the locks of the GPU and core images, with hashes; UPGRADE=1 takes the newest releases that fit.
	@compile="$(PY) -m uv pip compile --quiet --config-file requirements/uv.toml --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --generate-hashes --annotation-style line $(if $(call on,UPGRADE),--upgrade) \
	  --constraints requirements/constraints.txt --extra pipelines pyproject.toml -"; \
	export UV_CUSTOM_COMPILE_COMMAND="make lock-images"; \
	echo setuptools | $$compile --extra core --excludes requirements/image-core-excludes.txt --output-file requirements/core.lock; \
	echo setuptools | $$compile --extra generate --output-file requirements/generate-gpu.lock; \
	printf 'setuptools\nwheel\nflash-attn\n' | $$compile --extra train --extra qlora --output-file requirements/train-gpu.lock
	@grep -c == requirements/core.lock requirements/generate-gpu.lock requirements/train-gpu.lock

##@ Cluster

.PHONY: manifests
manifests: ## Print the rendered OVERLAY (kind, a100, kueue); needs no cluster.
	@kubectl kustomize manifests/overlays/$(or $(OVERLAY),kind)

.PHONY: deploy
deploy: $(if $(filter kind,$(OVERLAY)),kind-secret) ## Apply OVERLAY to the cluster of CONTEXT.
	@test -n "$(OVERLAY)" || { echo "make: OVERLAY= is needed: kind, a100 or kueue" >&2; exit 1; }
	@$(KUBECTL) apply --kustomize manifests/overlays/$(OVERLAY)

.PHONY: kind-up
kind-up: ## Make a kind cluster with Kubeflow Pipelines and the training operator, with the releases and settings of manifests/README.md.
	@kind get clusters | grep --quiet --line-regexp $(KIND_CLUSTER) || kind create cluster --name $(KIND_CLUSTER) --wait 5m
	@kubectl --context kind-$(KIND_CLUSTER) apply --kustomize "github.com/kubeflow/pipelines/manifests/kustomize/cluster-scoped-resources?ref=$(KFP_VERSION)"
	@kubectl --context kind-$(KIND_CLUSTER) wait crd/applications.app.k8s.io --for condition=established --timeout 60s
	@kubectl --context kind-$(KIND_CLUSTER) apply --kustomize "github.com/kubeflow/pipelines/manifests/kustomize/env/platform-agnostic?ref=$(KFP_VERSION)"
	@kubectl --context kind-$(KIND_CLUSTER) --namespace kubeflow patch configmap workflow-controller-configmap --patch-file manifests/kubeflow-pipelines/workflow-defaults.yaml
	@kubectl --context kind-$(KIND_CLUSTER) --namespace kubeflow set env deployment/workflow-controller DEFAULT_REQUEUE_TIME=1s
	@kubectl --context kind-$(KIND_CLUSTER) --namespace kubeflow set env deployment/ml-pipeline-persistenceagent TTL_SECONDS_AFTER_WORKFLOW_FINISH=604800
	@kubectl --context kind-$(KIND_CLUSTER) apply --server-side --kustomize "github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=$(TRAINING_OPERATOR_VERSION)"
	@kubectl --context kind-$(KIND_CLUSTER) --namespace kubeflow wait deployment --all --for condition=available --timeout 20m

.PHONY: kind-load
kind-load: ## Load the images into the kind cluster, in place of a registry.
	@kind load docker-image --name $(KIND_CLUSTER) $(IMAGE_NAMES:%=$(REGISTRY)/dice-%:$(TAG))

.PHONY: kind-secret
kind-secret: ## Give the S3 server of OVERLAY=kind random keys, once; they are in the cluster and in no file.
	@random() { head -c $$1 /dev/urandom | od -An -tx1 | tr -d ' \n'; }; \
	$(KUBECTL) --namespace kubeflow get secret dice-s3 >/dev/null 2>&1 || \
	printf 'AWS_ACCESS_KEY_ID=%s\nAWS_SECRET_ACCESS_KEY=%s\n' "$$(random 10)" "$$(random 20)" | \
	$(KUBECTL) --namespace kubeflow create secret generic dice-s3 --from-env-file /dev/stdin

##@ Cluster runs

.PHONY: preflight
preflight: $(STAMP) ## Check whether the cluster has what PRESET needs; each line says ok or what to do.
	@set -f; exec $(PY) -m pipelines preflight $(PIPELINE_OPTIONS)

.PHONY: submit
submit: $(STAMP) ## Start a run of PRESET. RUN= names it, and an existing name continues that run; WAIT=1 follows it, DRY_RUN=1 only shows it; SET= as for compile.
	@set -f; exec $(PY) -m pipelines submit $(PIPELINE_OPTIONS) $(if $(RUN),--run "$(RUN)") $(if $(call on,WAIT),--wait) $(if $(call on,DRY_RUN),--dry-run)

.PHONY: status
status: $(STAMP) ## Show RUN and its tasks, or the latest runs.
	@exec $(PY) -m pipelines status $(CLUSTER_OPTIONS) $(if $(RUN),--run "$(RUN)")

.PHONY: logs
logs: $(STAMP) ## Show what RUN's stages wrote; TASK=train shows only that stage, TAIL=0 all lines, RAW=1 those of Kubeflow and Argo too.
	@exec $(PY) -m pipelines logs $(CLUSTER_OPTIONS) --run "$(RUN)" $(if $(TASK),--task "$(TASK)") $(if $(TAIL),--tail "$(TAIL)") $(if $(call on,RAW),--raw)

.PHONY: board
board: $(STAMP) ## Serve the curves of RUN's trainings, or of all runs, with TensorBoard as they grow; PORT= (6006).
	@{ $(PY) -m uv venv --quiet --allow-existing --python $(PY) $(BOARD) && \
	  $(PY) -m uv pip install --quiet --no-deps --python $(BOARD)/bin/python -r $(BOARD_LOCK); } >&2 \
	  || { echo "make: TensorBoard cannot be installed in $(BOARD), see above; any TensorBoard shows the files in <training>/tensorboard/" >&2; exit 1; }
	@exec $(PY) -m pipelines board $(CLUSTER_OPTIONS) --python $(BOARD)/bin/python --folder $(BOARD)/curves $(if $(RUN),--run "$(RUN)") $(if $(PORT),--port "$(PORT)")

.PHONY: cancel
cancel: $(STAMP) ## Stop RUN, its training and its waiting pods; make retry continues it.
	@exec $(PY) -m pipelines cancel $(CLUSTER_OPTIONS) --run "$(RUN)"

.PHONY: retry
retry: $(STAMP) ## Continue RUN after it failed or was stopped, with its own images and settings; recurring runs too. WAIT=1 follows it.
	@exec $(PY) -m pipelines retry $(CLUSTER_OPTIONS) --run "$(RUN)" $(if $(call on,WAIT),--wait)

.PHONY: schedule
schedule: $(STAMP) ## Run PRESET on a schedule: CRON="0 0 3 * * 1" (seconds first) or EVERY=7d; PROMPTS=s3://bucket/prefix/ takes the newest below it.
	@set -f; exec $(PY) -m pipelines schedule $(PIPELINE_OPTIONS) $(if $(NAME),--name "$(NAME)") $(if $(CRON),--cron "$(CRON)") \
	  $(if $(EVERY),--every "$(EVERY)") $(if $(PROMPTS),--prompts "$(PROMPTS)") $(if $(call on,DRY_RUN),--dry-run)

.PHONY: unschedule
unschedule: $(STAMP) ## Disable the schedule NAME (by default the preset's), and delete it when no run of it is under way; FORCE=1 ends that run.
	@exec $(PY) -m pipelines unschedule $(CLUSTER_OPTIONS) --name "$(or $(NAME),$(PRESET))" $(if $(call on,FORCE),--force)

##@ Promoted models

# Of the pointer NAME, by default the preset's, below DICE_ROOT.
POINTER = "$${DICE_ROOT%/}/promoted/$(or $(NAME),$(PRESET)).json"
REQUIRE_ROOT = test -n "$$DICE_ROOT" || { echo "make: DICE_ROOT is not set: s3://bucket/prefix, where all runs keep their data" >&2; exit 1; }

.PHONY: history
history: $(STAMP) ## Show which models the pointer NAME (by default the preset's) has named, since when, by whom and on what evidence.
	@$(REQUIRE_ROOT); exec $(PY) -m dice_core.cli history --pointer $(POINTER)

.PHONY: promote
promote: $(STAMP) ## Point NAME to the model that a run has proposed, or to POLICY=s3://...; FORCE=1 REASON="why" goes against its evaluation.
	@$(REQUIRE_ROOT); exec $(PY) -m dice_core.cli promote --pointer $(POINTER) $(if $(POLICY),--policy "$(POLICY)") \
	  $(if $(call on,FORCE),--force) $(if $(REASON),--reason "$$REASON")

.PHONY: rollback
rollback: $(STAMP) ## Let NAME say again what it said before, or as entry TO= of its history wrote; REASON="why".
	@$(REQUIRE_ROOT); exec $(PY) -m dice_core.cli rollback --pointer $(POINTER) $(if $(TO),--to "$(TO)") $(if $(REASON),--reason "$$REASON")

##@ Cleaning

.PHONY: clean
clean: ## Remove caches and build results; the environment and the demo's data stay.
	@rm -rf build dist *.egg-info dice-*.yaml .pytest_cache .ruff_cache .mypy_cache .hypothesis local_outputs
	@find components dice_core pipelines tests -name __pycache__ -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: clean ## Remove the environment and the demo's data too.
	@rm -rf $(VENV) .demo

$(STAMP): $(LOCK) pyproject.toml requirements/install.py
	@$(FIND_PYTHON); "$$found" requirements/install.py $(VENV) $(LOCK)
	@touch $@
