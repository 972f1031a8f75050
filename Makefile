# Everything a newcomer needs: `make deploy` serves a model, `make help` lists the rest.

# What a user sets is text. `make` expands nothing in it, and a recipe reads it from the environment ("$$_MODEL"), where
# no shell looks into it.
GIVEN := MODEL NAME VERSION TP DEVICE DTYPE PORT HOST TOKENS RUN_DIR DRAIN MINUTES SHAPE REVISION PARTS ARGS QUESTION PYTHON TORCH_INDEX
$(foreach name,$(GIVEN),$(if $(filter-out undefined,$(origin $(name))),$(eval override $(name) := $$(value $(name)))))
# One word for a shell, where there is no environment to read it from.
quoted = '$(subst ','\'',$(1))'

MODEL   ?= smollm2
ifeq ($(origin NAME),undefined)
NAME    := $(shell printf %s "$$(basename -- $(call quoted,$(MODEL)))" | tr -c 'A-Za-z0-9_.-' '-')
endif
VERSION ?= 1.0
TP      ?= auto
DEVICE  ?= auto
DTYPE   ?= auto
PORT    ?= 8080
HOST    ?= 127.0.0.1
TOKENS  ?= on
RUN_DIR ?= run/$(NAME)-$(PORT)
DRAIN   ?= 30
MINUTES ?= 30
SHAPE   ?= llama-6.7b
QUESTION ?= What is the capital of Japan?

# A Python that was named and has everything is used as it is, and nothing is installed. One that lacks something (and
# python3, if none was named) is only the base of a virtual environment.
VENV   := .venv
NEEDED := torch transformers deepspeed ts model_archiver pydantic yaml psutil typer safetensors llguidance prometheus_client
LACKING = import importlib.util as u, sys; print(*([m for m in sys.argv[1:] if u.find_spec(m) is None] or ["nothing"]))
BASE_PYTHON := $(or $(PYTHON),python3)
ifneq ($(PYTHON),)
LACKS := $(shell $(call quoted,$(PYTHON)) -c '$(LACKING)' $(NEEDED) 2>/dev/null)
endif
ifeq ($(LACKS),nothing)
PY    := $(PYTHON)
STAMP :=
DOCS_STAMP :=
OPS_STAMP := cpu-ops
else
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OPS_STAMP := $(VENV)/.ops
DOCS_STAMP := $(VENV)/.docs
# Compiled ops belong to one environment: two that share a cache would recompile each other's.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
endif
# Not under their own names: tests and servers must not find a PORT or a NAME in their environment.
$(foreach name,$(GIVEN) PY LACKS BASE_PYTHON,$(eval export _$(name) := $$($(name))))
# The servers of `bench-failover` are on a CPU, whatever it has instructions for.
ifeq ($(DTYPE),auto)
export _PAIR_DTYPE := bf16
else
export _PAIR_DTYPE := $(DTYPE)
endif
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup cpu-ops ops model download shard mar deploy start run stop health token rollout status logs ask test test-unit test-long test-faults check docs audit bench bench-gpu bench-failover soak clean

help: ## list the targets and variables
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@printf '  MODEL=%s (smollm2, a local Hugging Face folder, or a hub id)   NAME=%s   VERSION=%s\n' "$$_MODEL" "$$_NAME" "$$_VERSION"
	@printf '  TP=%s (ranks: 2 on a CPU, all visible GPUs otherwise)   DEVICE=%s (cpu, gpu)   DTYPE=%s (bf16, fp16, fp32)\n' "$$_TP" "$$_DEVICE" "$$_DTYPE"
	@printf '  PORT=%s (inference; +1 management, +2 and +3 metrics, +5 and +6 gRPC)   HOST=%s TOKENS=%s   DRAIN=%s s   RUN_DIR=%s\n' "$$_PORT" "$$_HOST" "$$_TOKENS" "$$_DRAIN" "$$_RUN_DIR"
	@printf '  PYTHON=%s (one that has everything is used as it is; default: a virtual environment in $(VENV))   TORCH_INDEX=%s\n' "$$_PYTHON" "$$_TORCH_INDEX"

setup: $(STAMP) $(OPS_STAMP) ## install what is needed into .venv, exact versions, and compile the CPU operations

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -z "$$_PYTHON" || printf '%s lacks: %s\n' "$$_PYTHON" "$${_LACKS:-everything; it cannot be run}"
	@"$$_BASE_PYTHON" scripts/setup_venv.py --venv $(VENV) --python "$$_PYTHON" --torch-index "$$_TORCH_INDEX" --device "$$_DEVICE"
	@touch $@

$(VENV)/.ops: $(VENV)/.installed
	@"$$_PY" -m scripts.pack.build_ops --device "$$_DEVICE"
	@touch $@

# What `setup` needs where a PYTHON was named; in a virtual environment a stamp says that it was done.
cpu-ops: $(STAMP)
	@"$$_PY" -m scripts.pack.build_ops --device "$$_DEVICE"

ops: $(STAMP) ## compile ahead: a CPU's all-reduce, norms, rotary; on a GPU DeepSpeed's kernels for replace_with_kernel_inject
	@"$$_PY" -m scripts.pack.build_ops --device "$$_DEVICE" --kernels

model: $(STAMP) ## convert or check MODEL
	@"$$_PY" -m scripts.model.prepare -- "$$_MODEL"

download: $(STAMP) ## fetch MODEL=org/name (REVISION=...) from the hub into models/name (HF_TOKEN for gated models)
	@"$$_PY" -m scripts.model.download $(if $(REVISION),--revision "$$_REVISION") -- "$$_MODEL"

shard: $(STAMP) ## cut MODEL for TP ranks once, on CPUs: later starts read the shards in its folder instead of the whole model
	@"$$_PY" -m scripts.model.shard --name "$$_NAME" --model "$$_MODEL" --tp "$$_TP" --dtype "$$_DTYPE"

mar: $(STAMP) ## pack MODEL as model-store/NAME.mar
	@"$$_PY" -m scripts.pack --name "$$_NAME" --model "$$_MODEL" --version "$$_VERSION" --tp "$$_TP" --device "$$_DEVICE" --dtype "$$_DTYPE"

start: $(STAMP) ## start TorchServe with model-store/NAME.mar and wait until the model is ready
	@"$$_PY" -m scripts.serve start --run-dir "$$_RUN_DIR" --name "$$_NAME" --archive "model-store/$$_NAME.mar" --port "$$_PORT" --host "$$_HOST" $(if $(filter off,$(TOKENS)),--no-tokens)

deploy: setup mar start ask ## set up, prepare, pack, start, ask one question: the one command

stop: ## stop the server: running requests have DRAIN=30 seconds to end, a second `make stop` ends at once
	@"$$_PY" -m scripts.serve stop --run-dir "$$_RUN_DIR" --port "$$_PORT" --drain-s "$$_DRAIN"

run: $(STAMP) ## like start, in the foreground, for containers: SIGTERM drains and stops
	@exec "$$_PY" -m scripts.serve run --run-dir "$$_RUN_DIR" --name "$$_NAME" --archive "model-store/$$_NAME.mar" --port "$$_PORT" --host "$$_HOST" $(if $(filter off,$(TOKENS)),--no-tokens) --drain-s "$$_DRAIN"

health: ## exit code 0 if the model answers now, 1 if not, 2 if the server is dead
	@"$$_PY" -m scripts.serve.health --name "$$_NAME" --port "$$_PORT" --host "$$_HOST" --run-dir "$$_RUN_DIR"

token: ## print the inference token of a server with HOST=0.0.0.0
	@"$$_PY" -m scripts.serve.tokens --run-dir "$$_RUN_DIR" --port "$$_PORT"

rollout: ## replace the served version by model-store/NAME.mar (`make mar VERSION=2.0`) with no failed request
	@"$$_PY" -m scripts.serve.rollout --run-dir "$$_RUN_DIR" --name "$$_NAME" --port "$$_PORT" --archive "model-store/$$_NAME.mar"

status: ## show model, ports, processes
	@"$$_PY" -m scripts.serve status --run-dir "$$_RUN_DIR" --port "$$_PORT"

logs: ## print the workers' log
	@"$$_PY" -m scripts.serve logs --run-dir "$$_RUN_DIR" --port "$$_PORT"

ask: ## ask QUESTION
	@"$$_PY" -m scripts.serve.ask --name "$$_NAME" --port "$$_PORT" --host "$$_HOST" --run-dir "$$_RUN_DIR" -- "$$_QUESTION"

test: setup ## run all tests that need no GPU, unit tests first, faults in a short form
	@"$$_PY" -m pytest -m 'not gpu and not long'

test-unit: setup ## run the unit tests alone: no server, no weights
	@"$$_PY" -m pytest -m 'not gpu and not long' tests/unit

test-long: setup ## the tests that `make test` leaves out, those of faults among them (about 40 minutes)
	@"$$_PY" -m pytest -m 'long and not gpu' --timeout 900

test-faults: setup ## break everything that can break, one after the other (about 15 minutes)
	@"$$_PY" -m pytest -m faults --timeout 600

check: docs ## ruff, mypy and the documentation, and the audit where its database can be reached
	@"$$_PY" -m ruff check .
	@"$$_PY" -m ruff format --check .
	@"$$_PY" -m mypy
	@"$$_PY" -m scripts.dev.audit --if-possible

# Who only serves needs no site generator: it is installed here, not by `setup`.
$(VENV)/.docs: $(VENV)/.installed
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(STAMP) $(DOCS_STAMP) ## build the documentation in site/; a dead link is an error
	@NO_MKDOCS_2_WARNING=1 "$$_PY" -m mkdocs build --strict

audit: $(STAMP) ## known vulnerabilities of the exact versions (needs the internet)
	@$(PIP) -c constraints.txt pip-audit==2.10.1
	@"$$_PY" -m scripts.dev.audit

bench: setup ## measure tokens per second through HTTP beside plain transformers
	@"$$_PY" -m scripts.bench --model "$$_MODEL" --tp "$$_TP" --device "$$_DEVICE" --dtype "$$_DTYPE"

bench-gpu: $(STAMP) ## random weights of SHAPE (ARGS='--help' lists all) on TP ranks: engine, HTTP, and transformers beside them
	@"$$_PY" -m scripts.common.words "$$_ARGS" scripts.bench.gpu --shape "$$_SHAPE" --tp "$$_TP" --device "$$_DEVICE" --dtype "$$_DTYPE" $(if $(PARTS),--parts "$$_PARTS")

bench-failover: setup ## two servers behind HAProxy (apt-get install haproxy): one is killed under load and added back
	@"$$_PY" -m scripts.reliability.failover --model "$$_MODEL" --dtype "$$_PAIR_DTYPE"

soak: setup ## MINUTES=30 of mixed load with a fault a minute: every reply right or a clean error, memory flat
	@"$$_PY" -m scripts.reliability.soak --minutes "$$_MINUTES"

clean: ## remove archives, stopped servers' folders, converted models and caches (.venv stays)
	@"$$_PY" -m scripts.dev.clean
