# Two commands: `make demo` and `make test`. Each makes its own environment, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# One compute thread per process: here several processes share the cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Nothing is sent anywhere while it runs.
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help setup demo test test-fast test-long test-faults test-trl docs bench lint lock clean

help:
	@echo "make demo       warm-start a tiny model, then train it by RL on Ray and vLLM (about two minutes after set-up)"
	@echo "make test       lint, types and every test that is not in a long suite (nine to ten minutes after set-up)"
	@echo "make test-fast  the pure tests: no Ray, no vLLM (about three and a half minutes)"
	@echo "make test-long  the suites that take longer"
	@echo "make test-faults  kill -9, SIGSTOP, full disks and damaged files, on real Ray and vLLM (about twenty minutes)"
	@echo "make test-trl   our losses beside TRL's own, in an environment of its own"
	@echo "make docs       the documentation as pages, in site/"
	@echo "make bench      the figures of benchmarks/README.md (about eight minutes, on a machine with nothing else to do)"
	@echo "make lock       compile requirements/cpu.in to requirements/cpu.txt (needs uv)"

setup: $(READY)

$(READY): requirements/cpu.txt pyproject.toml requirements/preflight.py
	@$(PYTHON) requirements/preflight.py
	@echo "setting up .venv: about 3 GB, a few minutes the first time"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/cpu.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)
	@$(BIN)/python -m examples.demo

test: $(READY) lint test-fast
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "ray and not long and not faults"

test-fast: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not ray and not long and not trl and not faults"

test-long: $(READY)
	$(BIN)/python -m pytest -q -m long

test-faults: $(READY)
	$(BIN)/python -m pytest -q -n 4 --dist worksteal tests/faults tests/actors/engines/test_vllm_async_ends.py

test-trl: $(READY) .venv-trl/.ready
	$(BIN)/python -m pytest -q -m trl

.venv-trl/.ready:
	@echo "setting up .venv-trl: TRL and its own PyTorch, about 1.5 GB"
	@$(PYTHON) -m venv .venv-trl
	@.venv-trl/bin/python -m pip install -qq --disable-pip-version-check trl==1.16.0 torch==2.13.0+cpu transformers==5.19.0 numpy
	@touch .venv-trl/.ready

.venv-reverb/.ready:
	@echo "setting up .venv-reverb: Reverb and its TensorFlow, about 2 GB"
	@$(PYTHON) -m venv .venv-reverb
	@.venv-reverb/bin/python -m pip install -qq --disable-pip-version-check "dm-reverb[tensorflow]==0.14.0"
	@touch .venv-reverb/.ready

.venv-transferqueue/.ready:
	@echo "setting up .venv-transferqueue: TransferQueue, PyTorch and Ray, about 1.5 GB"
	@$(PYTHON) -m venv .venv-transferqueue
	@.venv-transferqueue/bin/python -m pip install -qq --disable-pip-version-check TransferQueue==0.1.11 torch==2.13.0+cpu ray==2.60.0
	@touch .venv-transferqueue/.ready

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks.learner_step
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.ray_calls
	$(BIN)/python -m benchmarks.memory

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:
	uv pip compile requirements/cpu.in --override requirements/overrides.txt --python-version 3.11 \
	  --no-emit-find-links --no-emit-index-url --no-header --no-annotate -o requirements/cpu.txt

clean:
	rm -rf .venv *.egg-info
