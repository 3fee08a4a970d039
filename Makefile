# A bare clone needs python3 (3.11 or newer) with its venv module, and make; every target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check bench

help:  ## this list
	@echo "make quickstart is the place to start. The targets:"
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do \
	  printf '  %-12s%s\n' "$$name" "$$text"; done
	@echo "Another interpreter: make install PYTHON=python3.12"

install: $(STAMP)  ## .venv with the tested versions (constraints.txt) and this folder, editable

# On the public index, torch for Linux is the CUDA build with gigabytes of nvidia packages. A machine without an NVIDIA
# GPU asks PyTorch's own CPU index first. Where that does not answer, the second command takes torch from wherever pip
# is set up to look; where it did, the torch of constraints.txt is there already and nothing more is fetched.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "`PYTHON` must be 3.11 or newer, got %d.%d. \
	Name another: make install PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Making .venv (once; a few minutes, mostly PyTorch) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@nvidia-smi >/dev/null 2>&1 || { echo "  no NVIDIA GPU: looking for PyTorch without CUDA ..."; \
	  $(BIN)/pip install -qq --disable-pip-version-check --no-deps --retries 0 --timeout 15 \
	    --index-url https://download.pytorch.org/whl/cpu -c constraints.txt torch >/dev/null 2>&1 \
	  || echo "  not there: taking torch from the default index ..."; }
	@echo "  installing the rest ..."
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@
	@echo "  done."

# Without the flags, accelerate warns about each default, and runs on a single core.
quickstart: $(STAMP)  ## pretrain a tiny msGFM on synthetic scenes; under 5 minutes on 2 cores, then look at runs/
	@$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  --num_cpu_threads_per_process $$(nproc) pretrain.py --recipe quickstart --resume

test: $(STAMP)  ## all tests; MSGFM_SAMPLE_DATA=FOLDER adds those on real imagery
	@$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(STAMP)  ## ruff, formatting, and the architecture test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -q modeling_tests/test_architecture.py

bench: $(STAMP)  ## print the tables of benchmarks/, about 25 minutes on an idle machine; the last on a GPU only
	@for name in swin experts loader gpu; do $(BIN)/python benchmarks/$$name.py || exit 1; done
