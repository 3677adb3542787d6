# make demo: a real job with real weights. make test: everything quick; make chaos: the rest. Each makes .venv with the tested versions first.
# make distill: a teacher's labels, a student trained on them, and both measured. make labels-check: exports through the
# other trainers' own readers, in .venv-labels: they pin versions of transformers that exclude each other and ours.
# make docs: all pages as a site, into build/site, with a reference made of the code; a link that leads nowhere ends it.
# make gpu: proof and figures on a GPU box, with its own torch and transformers ($(PYTHON)); nothing is installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo distill test docs labels-check chaos gpu check format clean

demo: $(VENV)/.installed
	$(BIN)/batch-rerank demo $(if $(MODEL),--model $(MODEL)) $(if $(QUERIES),--queries $(QUERIES))

distill: $(VENV)/.installed
	$(BIN)/python -m batch_rerank.distill

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 -rs $(ARGS)

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet -f .ci/mkdocs.yml

labels-check: .venv-labels/.installed
	PYTHONPATH=. .venv-labels/bin/python -m pytest -p no:cacheprovider -rs tests/test_labels_readers.py $(ARGS)

chaos: $(VENV)/.installed
	$(BIN)/python -m pytest -m "chaos or slow" $(ARGS)
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

.venv-labels/.installed: tests/labels-check.txt
	$(PYTHON) -m venv .venv-labels
	.venv-labels/bin/python -m pip install --quiet torch==2.13.0
	.venv-labels/bin/python -m pip install --quiet --no-deps --requirement tests/labels-check.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-labels demo-data build *.egg-info
