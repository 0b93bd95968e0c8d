# SPDX-License-Identifier: Apache-2.0
# make help lists what there is.

SHELL := /bin/bash -o pipefail
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Any Python from 3.11 on; `make PYTHON=/path/to/python3.12 ...` takes another.
PYTHON ?= $(shell tests/tools/find-python)
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
PYTEST_ARGS ?=
BENCH_ARGS ?=
CHART_TESTS := tests/unit/chart
QUICK_TESTS := tests/unit tests/property
MACHINE_TESTS := tests/contract tests/sanity tests/browser tests/integration
CLUSTER := tests/kubernetes/cluster
VM_TESTS := tests/contract/test_host_encryption.py tests/contract/test_host_freeze.py::test_a_filesystem_over_the_device_mapper_is_frozen \
	tests/contract/test_sock_diag.py tests/contract/test_nvme_target.py tests/contract/test_nvme_connector.py tests/vm
FAILOVER_TESTS := tests/vm/test_nvme_failover.py
IMAGE ?= nvmesh-csi:dev

SANITY_VERSION := v5.6.0
SANITY := $(CACHE)/bin/csi-sanity-$(SANITY_VERSION)
HELM_VERSION := v4.3.1
HELM := $(CACHE)/bin/helm-$(HELM_VERSION)
PROMTOOL_VERSION := v0.313.3
PROMTOOL := $(CACHE)/bin/promtool-$(PROMTOOL_VERSION)
MERMAID := $(CACHE)/mermaid.min.js
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PATH := $(CURDIR)/$(CACHE)/bin:$(PATH)

.PHONY: help
help: ## list the targets
	@echo 'usage: make TARGET        (times: 2 cores, first run / later runs)'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: ## as root: create, mount, expand and delete a volume on this machine, step by step (30 s / 5 s)
	@tests/tools/check-demo
	@$(MAKE) --no-print-directory $(VENV)/runtime
	@$(BIN)/nvmesh-csi demo

.PHONY: test
test: $(VENV)/test $(SANITY) debian-packages ## all tests; as root also those on real devices (17 min / 15 min)
ifdef PYTEST_ARGS
	@echo '== pytest'
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	@# Tests without shared state first, in parallel; then tests that share the machine, one after the other, while helm and
	@# promtool are built on the other core if needed; chart tests last, as they need them.
	@mkdir -p $(CACHE) ; \
	{ export GOMAXPROCS=1 ; nice $(MAKE) --no-print-directory $(HELM) && { nice $(MAKE) --no-print-directory $(PROMTOOL) || \
	echo '== promtool could not be built: the tests of the alerts are skipped' ; } ; } > $(CACHE)/tools.log 2>&1 & tools=$$! ; \
	echo '== pytest: $(QUICK_TESTS), side by side' ; \
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 $(QUICK_TESTS) --ignore=$(CHART_TESTS) ; quick=$$? ; \
	echo '== pytest: $(MACHINE_TESTS)' ; \
	$(BIN)/python -m pytest $(MACHINE_TESTS) ; machine=$$? ; \
	wait $$tools ; built=$$? ; cat $(CACHE)/tools.log ; [ $$built = 0 ] || { echo '== helm could not be built' ; exit 1 ; } ; \
	echo '== pytest: $(CHART_TESTS)' ; \
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(CHART_TESTS) ; chart=$$? ; \
	[ $$quick = 0 ] || echo '== failed above: $(QUICK_TESTS)' ; \
	[ $$machine = 0 ] || echo '== failed above: $(MACHINE_TESTS)' ; \
	[ $$quick = 0 ] && [ $$machine = 0 ] && [ $$chart = 0 ]
endif

.PHONY: test-vm
test-vm: $(VENV)/test $(SANITY) ## as root: encryption, lost devices and NVMe/TCP in one emulated machine, then failover (about 40 min)
	@tests/vm/build-guest $(CACHE)/vm $(BIN)/python
	@echo '== pytest in the guest: $(or $(PYTEST_ARGS),$(VM_TESTS))'
	@tests/vm/run $(CACHE)/vm -v $(or $(PYTEST_ARGS),$(VM_TESTS))
	@[ -n "$(PYTEST_ARGS)" ] || $(MAKE) --no-print-directory test-failover

.PHONY: test-failover
test-failover: $(VENV)/test ## as root: NVMe/TCP between three emulated machines that die and lose cables (about 13 min)
	@tests/vm/build-guest $(CACHE)/vm $(BIN)/python
	@echo '== pytest with three guests: $(or $(PYTEST_ARGS),$(FAILOVER_TESTS))'
	@tests/vm/run-machines $(CACHE)/vm $(BIN)/python -v -s $(or $(PYTEST_ARGS),$(FAILOVER_TESTS))

.PHONY: cluster-up
cluster-up: $(VENV)/test ## as root: a Kubernetes cluster on this machine with the driver in it (12 min / 1 min)
	@$(CLUSTER)/build
	@$(CLUSTER)/image
	@$(CLUSTER)/up
	@$(CLUSTER)/install
	@echo 'Next: $(CLUSTER)/in kubectl get pods -A; examples are in deploy/examples. make cluster-down stops it.'

.PHONY: cluster-down
cluster-down: ## stop that cluster and remove its traces; its state is kept (3 s)
	@$(CLUSTER)/down

.PHONY: cluster-wipe
cluster-wipe: ## delete the cluster and its programs
	@$(CLUSTER)/wipe

.PHONY: test-kubernetes
test-kubernetes: $(VENV)/test ## as root: the cluster tests and the official suite; KEEP=1 leaves the cluster running (2 h)
	@tests/kubernetes/run

.PHONY: bench
bench: $(VENV)/test debian-packages ## as root: measure the cost of calls beside a shell script, aims and history (10 min)
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)

.PHONY: bench-record
bench-record: $(VENV)/test debian-packages ## the same, and add its figures to tests/bench/history.jsonl and docs/performance.md (10 min)
	@$(BIN)/python -m tests.bench --record $(BENCH_ARGS)
	@$(BIN)/python -m tests.bench.document

.PHONY: bench-nvme
bench-nvme: $(VENV)/test ## as root: the same for NVMe over TCP, in emulated machines (1 h)
	@tests/vm/build-guest $(CACHE)/vm $(BIN)/python
	@$(BIN)/python -m tests.bench.nvme $(CACHE)/vm $(BENCH_ARGS)

.PHONY: bench-document
bench-document: $(VENV)/test ## generate the drawings and tables of docs/ from that history (1 s)
	@$(BIN)/python -m tests.bench.document

.PHONY: sanity-repeat
sanity-repeat: $(VENV)/test $(SANITY) debian-packages ## as root: csi-sanity twenty times in a row, mount and block (2 min)
	@$(BIN)/python -m tests.sanity.repeat 20

.PHONY: lint
lint: $(VENV)/test ## lint, format, types and layers only (1 min / 20 s)
	@$(BIN)/python -m pytest -q tests/unit/test_lint.py tests/unit/test_types.py tests/unit/test_layers.py

.PHONY: format
format: $(VENV)/test ## format the Python code with ruff (1 s)
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

.PHONY: coverage
coverage: $(VENV)/test $(SANITY) debian-packages ## all tests, and the lines that none reaches (8 min)
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet && $(BIN)/coverage report

.PHONY: proto
proto: $(VENV)/test ## generate csi_driver/rpc/pb from proto/*.proto (3 s)
	@$(BIN)/python proto/generate.py

.PHONY: docs
docs: $(VENV)/runtime ## generate the tables of docs/parameters.md and docs/mkfs.md, and the plugin's advice (1 s)
	@$(BIN)/python -m tests.tools.document_tables
	@$(BIN)/python -m tests.tools.plugin_advice

.PHONY: plugin
plugin: ## build kubectl nvmesh as one file, dist/kubectl-nvmesh (1 s)
	@tests/tools/build-plugin

.PHONY: docs-site
docs-site: $(CACHE)/docs $(MERMAID) ## build the documentation site in build/site; every link is checked (1 min / 10 s)
	@mkdir -p build/site-pages
	@PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(CACHE)/docs/bin/mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo 'build/site/index.html'

.PHONY: docs-serve
docs-serve: $(CACHE)/docs $(MERMAID) ## the same at http://127.0.0.1:8000, built again after each change
	@mkdir -p build/site-pages
	@PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(CACHE)/docs/bin/mkdocs serve --config-file docs/site/mkdocs.yml --watch docs --watch README.md

.PHONY: chart
chart: $(VENV)/test ## generate flags and parameters in the Helm chart, and docs/chart-values.md (1 s)
	@$(BIN)/python -m tests.tools.chart_schema
	@$(BIN)/python -m tests.tools.chart_values

.PHONY: manifests
manifests: $(VENV)/test ## generate deploy/kubernetes/*.yaml from the Helm chart (2 s; needs helm)
	@$(BIN)/python -m tests.tools.manifests

.PHONY: bundle
bundle: $(VENV)/test ## generate deploy/olm/bundle, the operator for OLM, from the Helm chart (5 s; needs helm)
	@$(BIN)/python -m tests.tools.bundle

.PHONY: lock
lock: $(CACHE)/lock ## lock requirements/*.txt to the newest versions (10 s)
	@UV=$(CACHE)/lock/bin/uv tests/tools/lock-requirements

.PHONY: image
image: ## build the container image (IMAGE=name:tag) with docker, podman or buildah (3 min)
	@tests/tools/build-image $(IMAGE)

.PHONY: clean
clean: ## remove everything that the targets created here
	rm -rf $(VENV) $(CACHE) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find csi_driver tests proto -name __pycache__ -type d -prune -exec rm -rf {} +

# --- prerequisites: each file marks a completed step --------------------------------------------------

$(VENV)/made:
	@tests/tools/make-venv '$(PYTHON)' $(VENV)
	@touch $@

$(VENV)/runtime: $(VENV)/made requirements/runtime.txt requirements/build.txt pyproject.toml
	@echo '== Python packages of the driver'
	@$(PIP) install --require-hashes -r requirements/runtime.txt -r requirements/build.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/test: $(VENV)/runtime requirements/test.txt
	@echo '== Python packages of the tests'
	@$(PIP) install --require-hashes -r requirements/test.txt
	@touch $@

$(CACHE)/lock:
	@tests/tools/make-venv '$(PYTHON)' $@
	@$@/bin/python -m pip --disable-pip-version-check --quiet install uv

$(CACHE)/release: requirements/release.txt
	@tests/tools/make-venv '$(PYTHON)' $@
	@$@/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r requirements/release.txt

$(CACHE)/docs: requirements/docs.txt
	@tests/tools/make-venv '$(PYTHON)' $@
	@$@/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r requirements/docs.txt || { rm -rf $@ ; exit 1 ; }

$(MERMAID): tests/tools/install-mermaid
	@tests/tools/install-mermaid $@ '$(PYTHON)'

$(SANITY): tests/tools/install-csi-sanity
	@tests/tools/install-csi-sanity $(SANITY_VERSION) $@ '$(PYTHON)'

$(HELM):
	@tests/tools/install-helm $(HELM_VERSION) $@ '$(PYTHON)'

.PHONY: helm
helm: $(HELM) ## build helm for the chart tests in $(CACHE)/bin (3 min / 0 s)

$(PROMTOOL):
	@tests/tools/install-promtool $(PROMTOOL_VERSION) $@ '$(PYTHON)'

.PHONY: promtool
promtool: $(PROMTOOL) ## build promtool for the tests of the alerts in $(CACHE)/bin (3 min / 0 s)

.PHONY: debian-packages
debian-packages:
	@tests/tools/install-debian-packages
