# The commands of this repository. Each does its own set-up on a Debian or Ubuntu machine that has Rust and a C compiler.

SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Building is the user's affair, mounting root's.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help demo test bench fuzz setup-demo setup-test

help:
	@echo "make demo    the whole job on this machine, with no cloud account, and cleaned up after (needs root: mounts)"
	@echo "make test    every check there is: format, lints, tests with real programs and a real kernel, docs, fuzzing"
	@echo "make bench   throughput beside the limit of this CPU and beside other libraries; tables and charts in target/"
	@echo "make fuzz    fuzz each parser for FUZZ_SECONDS seconds (60)"

setup-demo:
	@tests/setup demo

setup-test:
	@tests/setup test

demo: setup-demo
	cargo build --locked --workspace --bin nbdcrypt
	$(AS_ROOT) $(TARGET)/debug/nbdcrypt demo

test: setup-test
	@tests/all

bench: setup-test
	@benches/run

FUZZ_SECONDS ?= 60
fuzz: setup-test
	@fuzz/run $(FUZZ_SECONDS)
