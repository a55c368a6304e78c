# Bare `make` shows the targets. File targets do the work, so that a second run is quick.
PYTHON ?= python3
DATA_DIR ?= build/data
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCKS := tests/requirements.txt serve_config/cluster/requirements.txt scripts/bench/peers/requirements.txt tests/requirements-fuzz.txt tests/requirements-clients.txt .github/requirements-audit.txt
COMPILE = $(BIN)/uv pip compile --universal --generate-hashes --no-header --quiet $(ARGS)
SOURCES := $(wildcard handler/*.py handler/*/*.py scripts/packaging/*.py scripts/*.py) model/network.py model/weights.safetensors model/calibration.json \
           serve_config/model-config.yaml

.DEFAULT_GOAL := help
.PHONY: help setup serve demo test test-long test-all lint format package image manifests accuracy evaluate load soak benchmark sweep scale gpu fuzz fuzz-http train \
        digits drawings screenshots classes localise lock audit sbom clean
.DELETE_ON_ERROR:

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

setup: .venv/.installed ## make .venv with all that serving and training need (5.5 GB, about a minute)

serve: build/digits.mar ## build the archive and serve it on 127.0.0.1:8080; ARGS="--workers 4 ..." (--help shows all)
	$(BIN)/python -m scripts.serving $(ARGS)

demo: build/digits.mar ## serve the archive and open a page to draw on; ARGS="--url http://127.0.0.1:8080" uses a running server
	$(BIN)/python -m scripts.demo $(ARGS)

test: .venv/.installed-dev ## run the tests, unit and end to end (five minutes on two cores); ARGS="-k name" runs some
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: .venv/.installed-dev build/clients/.installed build/digits.mar ## run the tests that `make test` leaves out: those that measure for long
	$(BIN)/python -m pytest -m long --timeout 1200 $(ARGS)

test-all: ## run all tests: make test, then make test-long, then two minutes of make fuzz-http
	$(MAKE) test
	$(MAKE) test-long
	$(MAKE) fuzz-http ARGS="--seconds 120"

lint: .venv/.installed-dev ## ruff, mypy and the import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-dev ## let ruff lay out the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

package: build/digits.mar ## build build/digits.mar

image: .venv/.installed ## build the container with docker, podman or buildah; ARGS="--device cuda" (--help shows all)
	$(BIN)/python -m scripts.cluster.image $(ARGS)

manifests: .venv/.installed-dev ## check the Kubernetes manifests of serve_config/cluster; needs no cluster
	$(BIN)/python -m scripts.cluster.check $(ARGS)

accuracy: build/digits.mar ## send MNIST's test images through HTTP, plain and as photographs; DATA_DIR=... where they are
	$(BIN)/python -m scripts.research.accuracy --data-dir $(DATA_DIR) $(ARGS)

evaluate: .venv/.installed-dev ## measure the saliency maps beside controls; fails if a gate does; DATA_DIR=... ARGS="--images 200"
	$(BIN)/python -m scripts.research.evaluate --data-dir $(DATA_DIR) $(ARGS)

load: .venv/.installed-dev ## put a running server under load and report; ARGS="--rates 100,200,400 ..." (--help shows all)
	$(BIN)/python -m scripts.bench.load_test $(ARGS)

soak: .venv/.installed-dev build/digits.mar ## send mixed traffic for half an hour and check that the server stays as it was; ARGS="--minutes 1 --warm-up 15"
	$(BIN)/python -m scripts.bench.soak $(ARGS)

benchmark: .venv/.installed-peers ## measure this service beside its peers (a quarter of an hour); ARGS="--rounds 3 --systems noop,mosec"
	$(BIN)/python -m scripts.bench.benchmark_step
	$(BIN)/python -m scripts.bench.benchmark $(ARGS)

gpu: .venv/.installed-dev ## test and measure the service on a GPU, into build/gpu; ARGS="--parts speed --device cpu" (--help shows all)
	$(BIN)/python -m scripts.bench.gpu_report $(ARGS)

sweep: .venv/.installed-dev build/digits.mar ## measure what each setting of the server is worth (an hour); ARGS="--settings batchSize,vmargs"
	$(BIN)/python -m scripts.bench.sweep $(ARGS)

scale: .venv/.installed-dev build/digits.mar ## measure how cost grows, and draw .github/scaling.png; ARGS="--rounds 3"
	$(BIN)/python -m scripts.bench.scale $(ARGS)

fuzz: .venv/.installed-fuzz ## fuzz the path of a request for ten minutes, guided by coverage; ARGS="--seconds 60"
	$(BIN)/python -m tests.fuzz $(ARGS)

fuzz-http: .venv/.installed-dev build/digits.mar ## spoil valid requests and send them to a real server for ten minutes; ARGS="--seconds 60"
	$(BIN)/python -m tests.fuzz_http $(ARGS)

train: .venv/.installed ## train the network again (a quarter of an hour); DATA_DIR=... ARGS="--device cuda"
	$(BIN)/python -m model.train --data-dir $(DATA_DIR) $(ARGS)

digits: .venv/.installed ## draw the test digits again
	$(BIN)/python -m model.draw_samples

drawings: .venv/.installed ## draw .github/explained.png of the README again; a server must be running
	$(BIN)/python -m scripts.serving.explain model/samples/3-4.png model/samples/4-1.png model/samples/7-3.png --target predicted,9 \
		--output .github/explained.png

screenshots: .venv/.installed-dev ## take the screenshots of the page to draw on; a server must be running, and Chromium installed
	$(BIN)/python -m scripts.demo.screenshots $(ARGS)

classes: .venv/.installed ## make an image that maximises each class; DATA_DIR=...
	$(BIN)/python -m scripts.research.class_images --data-dir $(DATA_DIR) --output .github/classes.png $(ARGS)

localise: .venv/.installed-dev ## find digits in photographs by their saliency maps; a server must be running
	$(BIN)/python -m model.photograph model/samples/3-4.png model/samples/5-1.png --output-dir build/photographs
	$(BIN)/python -m scripts.research.localise "build/photographs/3-4 phone.jpg" "build/photographs/3-4 blackboard.jpg" \
		"build/photographs/5-1 ruled paper.jpg" "build/photographs/5-1 canvas.png" \
		--size 168 --columns 2 --output .github/localised.png $(ARGS)

lock: .venv/.installed-dev ## pin pyproject.toml's packages with hashes, each where it is used; ARGS=--upgrade takes newer versions
	$(COMPILE) pyproject.toml -o requirements.txt
	$(COMPILE) pyproject.toml --group dev --constraint requirements.txt -o tests/requirements.txt
	printf 'torch ; python_version < "3"\ntorchvision ; python_version < "3"\n' | $(COMPILE) pyproject.toml --group image --overrides - --constraint requirements.txt -o serve_config/cluster/requirements.txt
	$(COMPILE) --group peers --constraint tests/requirements.txt -o scripts/bench/peers/requirements.txt
	$(COMPILE) --group fuzz -o tests/requirements-fuzz.txt
	$(COMPILE) --group clients -o tests/requirements-clients.txt
	$(COMPILE) --group audit --constraint tests/requirements.txt --constraint scripts/bench/peers/requirements.txt -o .github/requirements-audit.txt

audit: build/audit/.installed ## check all locked packages for known vulnerabilities; needs a network; ARGS="-s osv"
	build/audit/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off $(LOCKS:%=-r %) $(ARGS)

sbom: build/audit/.installed ## list what serving and training install, as CycloneDX, in build/sbom.json
	build/audit/bin/cyclonedx-py requirements requirements.txt --pyproject pyproject.toml --output-reproducible -o build/sbom.json

clean: ## remove what was built, except .venv
	rm -rf build .pytest_cache .mypy_cache .ruff_cache

build/digits.mar: .venv/.installed $(SOURCES)
	$(BIN)/python -m scripts.packaging

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv ..."
	$(PIP) install --require-hashes -r requirements.txt
	@touch $@

.venv/.installed-dev: .venv/.installed tests/requirements.txt
	$(PIP) install --require-hashes -r tests/requirements.txt
	@touch $@

.venv/.installed-peers: .venv/.installed-dev scripts/bench/peers/requirements.txt
	$(PIP) install --require-hashes -r scripts/bench/peers/requirements.txt
	@touch $@

.venv/.installed-fuzz: .venv/.installed-dev tests/requirements-fuzz.txt
	$(PIP) install --require-hashes -r tests/requirements-fuzz.txt
	@touch $@

build/clients/.installed: tests/requirements-clients.txt # a venv of its own: these clients want other versions of what the tests use
	$(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r tests/requirements-clients.txt
	@touch $@

build/audit/.installed: .github/requirements-audit.txt # a venv of its own: the packages that are checked need not be installed
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r .github/requirements-audit.txt
	@touch $@
