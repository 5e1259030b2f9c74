# make pretrain and make test work on a fresh clone with nothing but Python 3.11 or newer; all else is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA := corpora/simulated.fasta.gz
THREADS := $(or $(OMP_NUM_THREADS),$(shell getconf _NPROCESSORS_ONLN))

.DEFAULT_GOAL := help
.PHONY: help install pretrain test test-all check format compat bounds wheel clean bench bench-embed bench-score gpu equivalence faults

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(READY) ## make the environment in .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hf_plm needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Making the environment in $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(DATA): $(READY)
	@mkdir -p $(@D)
	@$(BIN)/hf-plm simulate $@

pretrain: $(DATA) ## pretrain a small model on simulated proteins: runs/demo/hub
	@HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml --quiet \
		--num_cpu_threads_per_process $(THREADS) launch/pretrain.py launch/recipes/demo.yaml --data.train $(DATA) --data.cache corpora --run.folder runs/demo

test: $(READY) ## run the tests (a quarter of an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY) ## run every test that needs no GPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu"

equivalence: $(READY) ## the same run on 1 to 4 processes and every engine that a CPU can run (15 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/equivalence tests/test_fsdp2.py -m "not gpu"

faults: $(READY) ## kill, stop, starve and damage runs, and see them go on (half an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -m "not gpu"

bench: $(READY) ## the CPU benchmarks, in runs/bench (20 minutes, on a machine that does nothing else)
	@$(BIN)/python benchmarks/cpu_train.py --out runs/bench/cpu_train.json
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/input_path.py --out runs/bench/input_path.json
	@$(BIN)/python benchmarks/startup.py --out runs/bench/startup.json
	@$(BIN)/python benchmarks/scaling.py --out runs/bench/scaling.json

bench-embed: $(READY) ## embedding on the CPU side by side, and its memory, in runs/bench (15 minutes)
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/cpu_embed.py --out runs/bench/cpu_embed.json
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/embed_memory.py --out runs/bench/embed_memory.json

bench-score: $(READY) ## masked marginals against the loop over positions, in runs/bench (20 minutes)
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/score.py --out runs/bench/score.json

gpu: $(READY) ## on a machine with a GPU: the tests marked gpu, then the benchmarks
	@$(BIN)/python -m pytest -m gpu
	@$(BIN)/python benchmarks/gpu_train.py --out runs/bench/gpu_train.json
	@$(BIN)/python benchmarks/gpu_embed.py --out runs/bench/gpu_embed.json
	@$(BIN)/python benchmarks/score.py --device cuda --out runs/bench/gpu_score.json
	@$(BIN)/python benchmarks/saving.py --preset 150m --tokens 16384

check: $(READY) ## format, lint, types, imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

compat: $(READY) ## use an export in three versions of transformers, 4.57 among them
	@bash tests/support/compat.sh $(BIN)/python

bounds: ## run the tests on the oldest versions that pyproject.toml allows
	@bash tests/support/bounds.sh $(PYTHON)

wheel: $(READY) ## build the wheel
	@$(BIN)/python -m build --wheel --outdir dist .

clean: ## remove what make made; runs and corpora stay
	@rm -rf $(VENV) build dist *.egg-info
