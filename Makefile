# Everything sets itself up: a virtual environment with pinned packages, then the work.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: demo test heavy lint types check-maps mutation clean

demo: $(STAMP)
	$(BIN)/mapdsl demo

test: $(STAMP) lint types check-maps
	$(BIN)/python -m pytest -q -n 2 -m "not heavy"

# Differential tests against installed peers: NeMo Automodel, transformers, compressed-tensors, torchao, DeepSpeed.
heavy: $(PEERS)
	$(BIN)/python -m pytest -q -n 2 -m heavy
	MAPDSL_KERNELS=compiled $(BIN)/python -m pytest -q -n 2 -m "not heavy" $(wildcard tests/test_codecs_*.py)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check-maps: $(STAMP)
	$(BIN)/mapdsl check $$(find rules -name '*.map' | sort)
	$(BIN)/mapdsl fmt --check $$(find rules -name '*.map' | sort)

mutation: $(STAMP)
	$(BIN)/python -m tests.mutation.run

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,lint]"
	touch $@

$(PEERS): $(STAMP) constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt transformers pillow compressed-tensors torchao
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt nemo-automodel
	$(BIN)/python -m pip install -q -c constraints.txt setuptools einops hjson msgpack ninja psutil py-cpuinfo pydantic
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-deps --no-build-isolation -c constraints.txt deepspeed
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
