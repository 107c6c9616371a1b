# The commands of this repository. Each does its own set-up on a Debian or Ubuntu machine that has Rust and a C compiler.

SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Building is the user's affair, mounting root's.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help build install uninstall packages demo test test-packages bench fuzz soak setup-demo setup-test \
        setup-packages setup-test-packages

help:
	@echo "make demo    the whole job on this machine, with no cloud account, and cleaned up after (needs root: mounts)"
	@echo "make test    every check there is: format, lints, tests with real programs and a real kernel, docs, fuzzing"
	@echo "make build   the release programs, their man pages and completions"
	@echo "make install, make uninstall    what make build built, below PREFIX (/usr/local) and DESTDIR; as root"
	@echo "make packages       a .deb and an .rpm, in target/packages"
	@echo "make test-packages  installs, uses and removes them in a clean Debian (needs root: chroot)"
	@echo "make bench   throughput beside the limit of this CPU and beside other libraries; tables and charts in target/"
	@echo "make soak    start and stop a volume SOAK_ROUNDS times (200) by its systemd unit, and see that nothing is left; then"
	@echo "             cut \`up\` off after each system call that changes state, start it again, and see the same"
	@echo "make fuzz    fuzz each parser for FUZZ_SECONDS seconds (60)"

setup-demo:
	@tests/setup demo

setup-test:
	@tests/setup test

build:
	packaging/build

install:
	@packaging/install

uninstall:
	@packaging/uninstall

setup-packages:
	@tests/setup packages

setup-test-packages:
	@tests/setup test-packages

packages: setup-packages build
	@packaging/packages

test-packages: setup-test-packages packages
	@tests/packages

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

SOAK_ROUNDS ?= 200
soak: setup-test
	cargo build --locked --workspace --bin nbdcrypt
	NBDCRYPT_SOAK_ROUNDS=$(SOAK_ROUNDS) cargo test --locked --workspace --features nbdcrypt-tests/interop --test kernel -- \
		systemd_stop_waits --nocapture
	NBDCRYPT_CUTS=all cargo test --locked --workspace --features nbdcrypt-tests/interop --test boot -- cuts --nocapture
