# SPDX-License-Identifier: GPL-2.0
# The commands of this project. kbuild reads Kbuild instead of this file.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help kernel modules run test mutants fuzz peers lint lint-series clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

kernel: ## build the release and debug kernels (from nothing: 25 min on 2 cores)
	scripts/setup
	scripts/kernel release
	scripts/kernel debug

modules: ## build async_fork.ko for both kernels
	scripts/setup
	scripts/kernel release --module
	scripts/kernel debug --module

run: ## Redis snapshots by plain fork and by async fork, side by side (SIZE=1G)
	scripts/setup
	scripts/run

test: ## all tests on the release and the debug kernel
	scripts/setup
	scripts/test

mutants: ## break the code in recorded ways and see the tests notice (about an hour)
	scripts/setup
	scripts/mutants

# bash would take SECONDS from its environment for the time that it runs.
unexport SECONDS
fuzz: ## random operations against a model (SECONDS=600 SEED= ROUNDS= KERNEL=debug MODE=async)
	scripts/setup
	scripts/fuzz $(if $(KERNEL),--kernel $(KERNEL)) $(if $(MODE),--mode $(MODE)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) \
		$(if $(ROUNDS),--rounds $(ROUNDS))

peers: ## other projects' tests, by plain and by async fork (three hours on debug; KERNEL=release ONLY=)
	scripts/setup --peers
	scripts/peers $(if $(KERNEL),--kernel $(KERNEL)) $(if $(ONLY),--only '$(ONLY)')

lint: ## formatting, house rules, checkpatch, shellcheck
	scripts/lint

lint-series: ## slow: the kernel builds after each patch of the series
	scripts/lint-series

clean: ## remove the cached kernels, modules and logs (not the compiler cache)
	scripts/kernel --clean
