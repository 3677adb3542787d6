# make demo: a real job with real weights. make test: everything quick; make chaos: the rest. Each makes .venv with the tested versions first.
# make gpu: proof and figures on a GPU box, with its own torch and transformers ($(PYTHON)); nothing is installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test chaos gpu check format clean

demo: $(VENV)/.installed
	$(BIN)/batch-rerank demo $(if $(MODEL),--model $(MODEL)) $(if $(QUERIES),--queries $(QUERIES))

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

chaos: $(VENV)/.installed
	$(BIN)/python -m pytest -m chaos $(ARGS)
	$(BIN)/python tests/chaos/campaign.py --kills 50

gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-data build *.egg-info
