# make quickstart   raw text to a trained, resumed model in minutes, each step shown as the command it is
# make test         the whole test suite
# make torture      the fault tests in full: every kill, signal, launcher and phase, and every command of the pages; TORTURE_SEED=N repeats one
# make mutations    take out one safeguard at a time and see that a test fails
# make check        style
PYTHON ?= python3
VENV ?= .venv
# The interpreter with everything installed. CPU-only machines take the CPU build of torch where the package index offers one; see README.
PY = $(VENV)/bin/python
TORCH ?= torch>=2.10,<2.14
# How long the quick start may train: the number of its steps follows from what this machine makes of a few.
MINUTES ?= 4

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: quickstart install test torture mutations check clean

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet -e ".[test]"
	touch $@

install: $(VENV)/installed

quickstart: install
	python tools/download.py --dataset pystdlib --out data/raw/pystdlib.jsonl --max-bytes 24M
	python tools/train_tokenizer.py data/raw/pystdlib.jsonl --vocab-size 4096 --out data/tokenizers/pystdlib-4k
	python tools/tokenize_parallel.py data/raw/pystdlib.jsonl --tokenizer data/tokenizers/pystdlib-4k --seq-len 256 --val-ratio 0.02 --workers 2 --out data/pystdlib
	test -s build/toy-steps || { mkdir -p build; python tools/plan_run.py --config configs/toy.yaml --fit-minutes $(MINUTES) --quiet >build/toy-steps; }
	OMP_NUM_THREADS=1 torchrun --nproc-per-node $(RANKS) launch/train.py --config configs/toy.yaml train.total_step_budget=$$(cat build/toy-steps) --steps-today $$(($$(cat build/toy-steps) / 4))
	torchrun --nproc-per-node 1 launch/train.py --config configs/toy.yaml train.total_step_budget=$$(cat build/toy-steps) engine.zero_stage=2
	python tools/ledger.py show checkpoints/toy
	python tools/report.py checkpoints/toy
	python launch/generate.py checkpoints/toy --prompt "    def __init__(self" --max-tokens 150 --temp 0.7 --seed 1
	@echo
	@echo "All about the run is in checkpoints/toy/logs/report/report.html. Next, with 'source $(VENV)/bin/activate':"
	@echo "  python launch/train.py --config configs/toy.yaml train.total_step_budget=1600 --minutes-today 10    train on, the rest of the text"
	@echo "  python tools/tokenize_parallel.py YOUR.txt --tokenizer data/tokenizers/pystdlib-4k --seq-len 256 --out data/pystdlib"
	@echo "  python launch/train.py --config configs/toy.yaml train.total_step_budget=0 --only-new               train on your text too"
	@echo "  tensorboard --logdir checkpoints/toy/logs/tensorboard"

# two gloo ranks without a GPU; with GPUs one rank each over NCCL
RANKS = $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo 2)

test: install
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

torture: install
	TORTURE=1 python -m pytest tests/faults tests/checkpoint tests/train tests/data tests/corpus tests/doctor tests/engine/test_refused_steps.py tests/test_config.py tests/test_walk.py

mutations: install
	python tests/faults/mutations.py

check: install
	ruff check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
