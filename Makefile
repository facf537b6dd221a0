# `make demo`, `make test` and `make bench` each start from nothing: environment, install, run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-output

.PHONY: demo eval test bench lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the guard on a real small VLM, with tables and figures (in $(OUT)/)"
	@echo "make eval   every defence on that model, with the report (in results/pocket/)"
	@echo "make test   lint, types and tests"
	@echo "make bench  what the guard costs: time and memory (in bench-output/)"
	@echo "make clean  remove the environment and what demo and bench wrote"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/vlm-safeguard demo --out $(OUT)

eval: $(VENV)/.installed
	$(BIN)/vlm-safeguard eval --plan recipes/pocket.yaml --out results/pocket
	$(BIN)/vlm-safeguard report results/pocket --withhold

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/speed.py pocket
	$(BIN)/python benchmarks/cost.py pocket
	$(BIN)/python benchmarks/baselines.py pocket

clean:
	rm -rf $(VENV) $(OUT) bench-output
