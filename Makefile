# SPDX-License-Identifier: Apache-2.0
# `make` lists the targets. Everything runs on .venv, which scripts/setup makes.

PY := .venv/bin/python
SH_SCRIPTS := scripts/setup scripts/lock .ci/run $(wildcard tests/*/*.sh)
C_SOURCES := $(wildcard ebpf/*.[ch] tests/ebpf/*.[ch] bench/xdp/*.[ch])
KUBE ?= embedded
PYTEST := $(PY) -m pytest
ARGS ?=

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 16

.PHONY: demo
demo: setup ## show the whole tier at work in namespaces (KUBE=real: with a real control plane)
	KUBE=$(KUBE) $(PY) -m tests.lab.demo

.PHONY: lab lab-down
lab: setup ## build the demo's network and leave it up to play with
	KUBE=$(KUBE) $(PY) -m tests.lab.demo --keep
lab-down: ## remove what `make lab` built
	$(PY) -m tests.lab.demo --down

.PHONY: setup
setup: ## install what this machine lacks (quiet when there is nothing to do)
	@scripts/setup

# -- checks

.PHONY: test
test: setup check control-plane ansible ## everything: the checks, then all tests by level
	$(PYTEST) $(ARGS)

# Each part can be run alone; `make -k check` goes on after the first that fails.
CHECKS := check-python check-types check-imports check-c check-shell check-yaml check-docs
.PHONY: check $(CHECKS)
check: $(CHECKS) ## what needs no running: style, types, imports, generated pages
$(CHECKS): setup
check-python:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
check-types:
	.venv/bin/mypy
check-imports:
	.venv/bin/lint-imports --no-logo
check-c:
	.venv/bin/clang-format --style=file:ebpf/.clang-format --dry-run -Werror $(C_SOURCES)
check-shell:
	shellcheck $(SH_SCRIPTS)
check-yaml:
	.venv/bin/yamllint --strict .
check-docs:
	$(PY) docs/generate.py --check

.PHONY: test-thought test-rooms test-bpf test-netns test-k8s test-deploy
test-thought: setup ## the pure middle: seconds
	$(PYTEST) --level thought $(ARGS)
test-rooms: setup ## each adapter against a fake of its protocol
	$(PYTEST) --level rooms $(ARGS)
test-bpf: setup ## packets through the real program
	$(PYTEST) --level bpf $(ARGS)
test-netns: setup ## namespaces, FRR, ExaBGP, XDP
	$(PYTEST) --level netns $(ARGS)
test-k8s: setup control-plane ## a real control plane
	$(PYTEST) --level k8s $(ARGS)
test-deploy: setup ansible ## units and roles
	$(PYTEST) --level deploy $(ARGS)

.PHONY: control-plane
control-plane: ## find or build etcd, kube-apiserver and kube-proxy (once, cached)
	@sh tests/k8s/build.sh >/dev/null || [ $$? -eq 3 ]

.PHONY: chaos
chaos: setup ## faults under load in the lab: what was lost (KUBE=real, ARGS=--only ..., ARGS=--write)
	KUBE=$(KUBE) $(PY) -m tests.lab.chaos $(ARGS)

.PHONY: bench
bench: setup ## measure the plan, the probes, BGP and the forwarder: the sections of docs/benchmarks.md
	$(PY) -m bench.plan
	$(PY) -m bench.probe
	$(PY) -m bench.bgp
	$(PY) -m bench.xdp.bench

.venv-ansible/.locked: requirements-ansible.lock
	@echo "setup: ansible-lint, in a virtual environment of its own" >&2
	@/usr/bin/python3 -m venv .venv-ansible
	@.venv-ansible/bin/pip install --quiet --disable-pip-version-check --require-hashes --requirement $<
	@touch $@

.PHONY: ansible
ansible: .venv-ansible/.locked ## ansible-core and ansible-lint for the tests of the roles

# -- products

.PHONY: docs
docs: setup ## write the generated reference pages
	$(PY) docs/generate.py

.PHONY: wheel
wheel: setup ## sdist, and the wheel built from it, into dist/
	rm -rf dist
	$(PY) -m hatchling build --target sdist --directory dist
	mkdir -p build/sdist && tar -xzf dist/*.tar.gz --strip-components=1 --directory build/sdist
	cd build/sdist && $(CURDIR)/$(PY) -m hatchling build --target wheel --directory $(CURDIR)/dist
	rm -rf build/sdist

.PHONY: wheelhouse
wheelhouse: wheel ## all that an offline host needs, for this machine's Python, into dist/wheelhouse
	$(PY) -m pip wheel --quiet --require-hashes --requirement requirements.lock --wheel-dir dist/wheelhouse
	cp dist/*.whl dist/wheelhouse/

.PHONY: lock
lock: setup ## resolve the lock files again
	scripts/lock

.PHONY: clean
clean: ## remove what was built here (not .venv)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
