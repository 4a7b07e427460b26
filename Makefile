# Every target makes .venv by itself and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-browser quality bench checkpoint clean

help:
	@echo "make demo      heat maps of photographs and textures with the embedded checkpoint, under outputs/demo"
	@echo "make test      the test suite"
	@echo "make test-slow the tests that take minutes"
	@echo "make test-browser  the tests of the page in Chromium (apt-get install chromium)"
	@echo "make quality   ruff and mypy"
	@echo "make bench     all benchmarks, and docs/benchmarks.md from them; leave the machine alone meanwhile"
	@echo "make checkpoint  the embedded checkpoint from nothing, under outputs/checkpoint; 87 minutes on two cores, longer without bfloat16"

# torch comes first and alone: the exact version finds a CPU build where there is one.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/python -m examples.demo --output-dir outputs/demo

# Two processes of one thread each; a file's tests stay together, as they share what they set up.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not browser" -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-browser: $(READY)
	$(BIN)/python -m pytest -m browser

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks

checkpoint: $(READY)
	$(BIN)/python -m examples.make_checkpoint --output-dir outputs/checkpoint

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
