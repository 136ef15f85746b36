# `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# System packages, Debian's names. `make setup` installs those that are missing.
PACKAGES := bird2 build-essential ca-certificates conntrack containerd containernetworking-plugins curl frr \
            gobgpd iproute2 ipset iptables iputils-arping iputils-ping jq keepalived nftables procps runc \
            tcpdump

# Tests that start clusters: two at a time is what two cores carry.
THREADS ?= 2

# How often bench-failover does everything it measures.
ROUNDS ?= 20

# How long the soak lasts.
MINUTES ?= 30

# The oldest and the newest Kubernetes that are supported; `make e2e` runs on the one between.
VERSIONS := 1.31 1.36

# How long `make fuzz` takes for each parser, and for which: all of them unless TARGET names some.
SECONDS ?= 20
TARGET ?=

# Services in `make bench` (2000 unless set) and `make bench-scale` (10000).
SERVICES ?=
# Nodes in `make bench-scale` (3 unless set) and `make bench-watch` (60).
NODES ?=

.PHONY: help setup fetch images images-routing images-test release release-test publish build kubernetes demo lab test lint unit fuzz e2e versions chart bench bench-failover bench-scale bench-service bench-watch soak bench-routing vm docs pictures plugin crds manifest deny clean

help: ## This list
	@grep -hE '^[a-z][a-z0-9-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## Install the system packages that are missing (apt, as root)
	@missing=(); for package in $(PACKAGES); do \
	  dpkg-query -W -f '$${db:Status-Status}' "$$package" 2>/dev/null | grep -qx installed || missing+=("$$package"); \
	done; \
	if (( $${#missing[@]} )); then \
	  echo "installing $${missing[*]}"; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; \
	fi
	@for tool in cargo go; do command -v $$tool >/dev/null || \
	  { echo "make: $$tool is missing: install Rust 1.95 (rustup.rs) and Go 1.26 (go.dev/dl)" >&2; exit 1; }; done

# Labs have networks that lead nowhere: what they take from the cache (PURELB_CACHE, else ~/.cache/purelb) is there before one starts.
fetch: setup ## Fetch and build all that the tests need from elsewhere: after it they need no network
	@.ci/deny --fetch
	@e2e/kubernetes/build --all >/dev/null
	@for version in $(VERSIONS); do KUBERNETES=$$version e2e/kubernetes/build >/dev/null; done
	@charts/helm/build >/dev/null
	@charts/monitoring/promtool >/dev/null
	@images/routing --lab >/dev/null
	@docs/mdbook >/dev/null

images: setup ## Build the images of the two programs, without Docker: OCI archives in target/images
	images/build

images-routing: setup ## Build the images of BIRD and FRR from Debian's packages: OCI archives in target/images
	images/routing

images-test: kubernetes ## Build them twice for one digest, and install them on real kubelets (two optimised builds)
	images/test --install

# What a release is called, where it will be pulled from, the key that signs it, and where the plugin's archives will be (images/release).
VERSION ?=
REGISTRY ?=
KEY ?=
DOWNLOAD ?=
# What is pushed.
FROM ?=

release: setup ## Build all that a release has, for amd64 and arm64, in target/release-VERSION (VERSION=1.2.3 REGISTRY=HOST/PATH KEY=FILE)
	@REGISTRY="$(REGISTRY)" KEY="$(KEY)" DOWNLOAD="$(DOWNLOAD)" images/release "$(VERSION)"

publish: setup ## Push a release to the registry that it names (FROM=target/release-1.2.3), or another one (REGISTRY=HOST/PATH)
	@REGISTRY="$(REGISTRY)" images/publish "$(FROM)"

release-test: kubernetes ## Build a release twice, push it to a registry on loopback, and install it from there on kubelets
	images/test-release --install

build: ## Build the two programs, optimised
	cargo build --release --locked --package allocator --package lbnodeagent

plugin: ## Build kubectl-purelb, optimised, for this machine: target/release/kubectl-purelb
	cargo build --release --locked --package kubectl-purelb
	@echo "target/release/kubectl-purelb: put it into a directory of PATH, and kubectl purelb finds it"

kubernetes: setup ## Build the Kubernetes programs of the lab and Helm, once (some minutes, then cached)
	@e2e/kubernetes/build >/dev/null
	@charts/helm/build >/dev/null

demo: kubernetes ## A cluster, six Services, a cut cable: two minutes (KEEP=1 leaves it up)
	@cargo build --quiet --locked --workspace --bins
	@KEEP=$(KEEP) target/debug/demo

lab: kubernetes ## A shell in a cluster with the product installed
	@cargo build --quiet --locked --workspace --bins
	@target/debug/demo --shell

test: fetch lint deny unit chart e2e versions docs ## All tests

lint: setup ## Format and clippy, without warnings
	cargo fmt --all --check
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings

# Every command below selects the whole workspace, since what else it selects from decides with which features all is compiled. The tests
# of labs are one program, e2e/tests/labs.rs.
UNITS := --lib $(patsubst %,--test %,$(notdir $(basename $(filter-out e2e/%,$(wildcard */tests/*.rs)))))

unit: setup ## Unit and property tests, and those of the node agent against the kernel
	cargo test --quiet --locked --workspace $(UNITS)
	cargo test --quiet --locked --workspace --doc

fuzz: setup ## Look for bytes that a parser of strangers' bytes does not survive (SECONDS=20 for each, TARGET=pool for one)
	fuzz/run $(SECONDS) $(TARGET)

chart: setup ## The chart's tests; the manifest must be what it renders
	charts/test

e2e: kubernetes ## Tests on real clusters in network namespaces (as root); KUBERNETES=1.36 for another version than 1.34
	@e2e/kubernetes/build --all >/dev/null
	@images/routing --lab >/dev/null
	cargo build --quiet --locked --workspace --bins
	rm -rf target/e2e-rights
	cargo test --quiet --locked --no-fail-fast --workspace --test labs -- --test-threads $(THREADS)
	target/debug/e2e-rights

versions: kubernetes ## The API's tests and the walkthrough on the oldest and the newest Kubernetes supported
	for version in $(VERSIONS); do KUBERNETES=$$version e2e/kubernetes/build >/dev/null; done
	cargo build --quiet --locked --workspace --bins
	for version in $(VERSIONS); do echo "Kubernetes $$version"; KUBERNETES=$$version \
	  cargo test --quiet --locked --workspace --test labs -- --test-threads $(THREADS) resources:: book:: walkthrough::; done

bench: kubernetes ## The allocator beside the bare API server (SERVICES=10000: as many), and its decisions alone
	cargo build --quiet --locked --release --workspace --bin allocator --bin bench-allocator --bin e2e-backend --bin kubectl-purelb
	PURELB_BIN_DIR=target/release target/release/bench-allocator --services $(or $(SERVICES),2000)
	cargo bench --quiet --locked --package allocator --bench decisions

bench-failover: kubernetes ## How long a client is without an address, beside keepalived (ROUNDS=20)
	@cargo build --quiet --locked --workspace --bins
	@target/debug/bench-failover $(ROUNDS)

bench-scale: kubernetes ## What many Services cost the allocator and an agent (SERVICES=10000 NODES=3)
	cargo build --quiet --locked --release --workspace --bin allocator --bin lbnodeagent --bin bench-scale --bin e2e-backend
	PURELB_BIN_DIR=target/release target/release/bench-scale --services $(or $(SERVICES),10000) --nodes $(or $(NODES),3)

bench-service: kubernetes ## How many connections to a Service fail when a node with one of its Pods dies, with the bypass and without (ROUNDS=10)
	cargo build --quiet --locked --workspace --bins
	ROUNDS=$(if $(filter command line,$(origin ROUNDS)),$(ROUNDS),10) \
	  cargo test --quiet --locked --workspace --test labs -- --ignored --nocapture dead_nodes::measured

bench-watch: kubernetes ## What many nodes on one segment cost each other, and how soon they replace one (NODES=60 MINUTES=1)
	cargo build --quiet --locked --release --workspace --bin allocator --bin lbnodeagent
	PURELB_BIN_DIR=$(CURDIR)/target/release NODES=$(or $(NODES),60) \
	  cargo test --quiet --locked --workspace --test labs -- --ignored --nocapture many_nodes::measured

soak: kubernetes ## Watch for false take-overs with all processors busy (MINUTES=30)
	@cargo build --quiet --locked --workspace --bins
	@target/debug/soak $(MINUTES)

bench-routing: kubernetes ## What a node's death and next hops that come and go cost, measured
	cargo build --quiet --locked --workspace --bins
	cargo test --quiet --locked --workspace --test labs -- --ignored --nocapture --test-threads 1 routing::measured
	cargo test --quiet --locked --workspace --test flows -- --ignored --nocapture measured

docs: ## Build the book in target/book (and mdBook itself, once: some minutes); unit tests check its links
	"$$(docs/mdbook | tail -n 1)" build docs
	@rm -f target/book/mdbook target/book/book.toml

# What a virtual node needs beside PACKAGES.
VM_PACKAGES := busybox-static kmod qemu-system-x86

vm: kubernetes ## A node that is a virtual machine: the real dummy driver, IPVS, a bond and a VLAN (QEMU, some minutes)
	@$(MAKE) --no-print-directory setup PACKAGES="$(VM_PACKAGES)"
	@e2e/vm/build >/dev/null
	cargo build --quiet --locked --workspace --bins
	cargo test --quiet --locked --workspace --test labs -- --ignored --nocapture --test-threads 1 vm::

pictures: ## Draw the book's pictures, docs/pictures/*.svg
	cargo run --quiet --locked --package pictures

crds: ## Write crds/*.yaml, docs/reference.md and docs/events.md from the Rust types, and install.yaml
	cargo run --quiet --locked --package crds
	charts/render >install.yaml
	charts/test --golden

manifest: ## Write install.yaml and charts/golden from the chart
	charts/render >install.yaml
	charts/test --golden

deny: setup ## Licences and sources of the dependencies, and known vulnerabilities where their database can be fetched
	@.ci/deny

clean: ## Remove what was built here (the Kubernetes programs stay in their cache)
	cargo clean
