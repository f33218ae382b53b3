# make help lists the targets; V=1 shows the commands; PYTHON=python3.12 picks the interpreter.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
KCONFIG_CONFIG ?= .config
Q := $(if $(filter 1,$(V)),,@)

# Idle threads of libgomp spin by default, and halt a computation when another process wants their
# core; spinning briefly costs nothing on an idle machine.
export GOMP_SPINCOUNT ?= 1000

# A pipeline and the tests start Python again and again: what they import is compiled once (make
# clean removes it).
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
STAMP := .venv/.stamp
KCONFIG := $(BIN)/python -m scripts.kconfig --config $(KCONFIG_CONFIG)
PIPELINE := $(BIN)/python -m scripts.pipeline --config $(KCONFIG_CONFIG)
QUICKSTART_CONFIG := runs/quickstart.config
SERVE_DEMO_CONFIG := runs/serve-demo.config

list_presets = for f in defconfigs/*; do \
	printf '  %-24s %s\n' "$${f\#\#*/}" "$$(sed -n '1s/^\# *//p' "$$f")"; done

##@ Run

.PHONY: all
ifneq ($(wildcard $(KCONFIG_CONFIG)),)
all: $(STAMP) ## Do what .config says: train, benchmark, report (the default)
	$(Q)$(PIPELINE)
else
# A failed recipe makes GNU make exit with 2; with --question it exits with 1 when something is to
# be done, and runs only the lines that start with +.
ifeq ($(or $(MAKECMDGOALS),all),all)
MAKEFLAGS += --question
endif
all:
	+@echo 'There is no $(KCONFIG_CONFIG) yet. One of:'
	+@echo '  make quickstart          the whole pipeline on a small model, in minutes'
	+@echo '  make <preset>_defconfig  load a preset (below); make defconfig-<a>+<b> merges'
	+@echo '  make menuconfig          choose everything yourself'
	+@echo 'then make. Presets:'
	+@$(list_presets)
	@false
endif

.PHONY: quickstart
quickstart: $(STAMP) ## Install, train a small GPT-2 on local text, measure what its hints buy
	$(Q)$(BIN)/python -m scripts.kconfig --config $(QUICKSTART_CONFIG) defconfig gpt2-quickstart
	$(Q)$(BIN)/python -m scripts.pipeline --config $(QUICKSTART_CONFIG)

.PHONY: demo
demo: $(STAMP) ## Download a 135M chat model (89 MiB); it answers whole, at 4 bits, and by hints
	$(Q)$(BIN)/python -m scripts.demo

.PHONY: demo-hints
demo-hints: $(STAMP) ## Make the demo's hints anew: measure, and calibrate
	$(Q)$(BIN)/python -m scripts.demo hints

.PHONY: serve
serve: $(STAMP) ## Serve a model over HTTP as .config says, until Ctrl-C
	$(Q)$(BIN)/python -m scripts.serve --config $(KCONFIG_CONFIG)

.PHONY: serve-demo
serve-demo: $(STAMP) ## Serve the demo's chat model, ask it with three quality bounds, and stop
	$(Q)$(BIN)/python -m scripts.kconfig --config $(SERVE_DEMO_CONFIG) defconfig serve-demo
	$(Q)$(BIN)/python -m scripts.serve --config $(SERVE_DEMO_CONFIG) demo

.PHONY: train
train: $(STAMP) ## Train as .config says, and write the hints
	$(Q)$(PIPELINE) train

.PHONY: bench
bench: $(STAMP) ## Benchmark what was trained
	$(Q)$(PIPELINE) bench

.PHONY: report
report: $(STAMP) ## Write the report of what was trained and benchmarked
	$(Q)$(PIPELINE) report

.PHONY: bench-offload
bench-offload: $(STAMP) ## Compare our offload runtime with its peers under memory limits, in minutes
	$(Q)$(BIN)/python scripts/experiments/offload/bench_offload.py $(or $(BENCH_OFFLOAD_ARGS),--json runs/offload.json --plot runs/offload.png)

.PHONY: bench-load
bench-load: $(STAMP) ## Time load, attach and first token beside reading the file; BENCH_LOAD_ARGS="--model DIR"
	$(Q)$(BIN)/python scripts/experiments/offload/bench_load.py $(BENCH_LOAD_ARGS)

.PHONY: bench-decode
bench-decode: $(STAMP) ## Decode in memory beside Transformers, torchao and llama.cpp (4 hours at most); BENCH_DECODE_ARGS
	$(Q)env -u GOMP_SPINCOUNT $(BIN)/python scripts/experiments/decode/bench_decode.py $(or $(BENCH_DECODE_ARGS),--json runs/decode.json)

.PHONY: bench-controller
bench-controller: $(STAMP) ## Judge the controller: dense, a trained mixture, pressure; BENCH_CONTROLLER_ARGS="--quick"
	$(Q)$(BIN)/python scripts/experiments/controller/bench_controller.py $(or $(BENCH_CONTROLLER_ARGS),--json runs/controller.json)

.PHONY: bench-progressive
bench-progressive: $(STAMP) ## What quality bounds of requests are worth, at equal memory (half an hour); BENCH_PROGRESSIVE_ARGS
	$(Q)$(BIN)/python scripts/experiments/progressive/bench_progressive.py $(or $(BENCH_PROGRESSIVE_ARGS),--json runs/progressive.json --plot runs/progressive.png)

.PHONY: study-signals
study-signals: $(STAMP) ## Train dozens of small models: is Adam's moment as good as Fisher? (1 hour)
	$(Q)$(BIN)/python scripts/experiments/study/study_signals.py $(or $(STUDY_SIGNALS_ARGS),--json runs/study/study.json --plot runs/study/study.png)

.PHONY: safety-table
safety-table: $(STAMP) ## Compare offloaders on damaged files, reused folders and unusual models
	$(Q)$(BIN)/python scripts/experiments/safety/safety_table.py

##@ Configure

.PHONY: menuconfig
menuconfig: $(STAMP) ## Change .config in a menu
	$(Q)$(KCONFIG) menuconfig

%_defconfig: $(STAMP) ## Load the preset defconfigs/<name> into .config
	$(Q)$(KCONFIG) defconfig $*

defconfig-%: $(STAMP) ## The same; defconfig-<base>+<fragment>+... merges presets
	$(Q)$(KCONFIG) defconfig $*

.PHONY: olddefconfig
olddefconfig: $(STAMP) ## Bring an old .config up to date, with defaults for what is new
	$(Q)$(KCONFIG) olddefconfig

.PHONY: savedefconfig
savedefconfig: $(STAMP) ## Write the lines of .config that differ from the defaults to defconfig
	$(Q)$(KCONFIG) savedefconfig

.PHONY: listdefconfigs
listdefconfigs: ## List the presets
	@$(list_presets)

##@ Develop

.PHONY: check
check: lint types test ## Lint, types, Kconfig lint and tests

.PHONY: lint
lint: $(STAMP) ## Check style, and the Kconfig files and presets
	$(Q)$(BIN)/ruff check
	$(Q)$(BIN)/ruff format --check
	$(Q)$(BIN)/python -m scripts.kconfig lint

.PHONY: types
types: $(STAMP) ## Check types
	$(Q)$(BIN)/mypy

.PHONY: test
test: $(STAMP) ## Run the tests in two processes; PYTEST_ARGS="-m slow" runs the slow ones
	$(Q)$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(or $(PYTEST_ARGS),-m "not slow")

CODEC_TESTS := -q -n 2 tests/unit/codecs/test_kernels.py tests/unit/codecs/test_every_kernel.py \
	tests/unit/codecs/test_attend.py tests/unit/codecs/test_native_encode.py \
	tests/unit/codecs/test_residuals.py \
	tests/unit/progressive/kv

.PHONY: check-reference
check-reference: $(STAMP) ## Test what computes where there is no C++ compiler
	$(Q)TIERHINTS_NATIVE=0 $(BIN)/python -m pytest $(CODEC_TESTS) \
		tests/integration/test_kernel_error.py

.PHONY: check-sanitized
check-sanitized: $(STAMP) ## Test the C++ kernels under sanitizers of addresses and undefined behaviour
	$(Q)TIERHINTS_NATIVE_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1" \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest $(CODEC_TESTS)

.PHONY: style
style: $(STAMP) ## Fix style where a program can
	$(Q)$(BIN)/ruff check --fix
	$(Q)$(BIN)/ruff format

.PHONY: doctor
doctor: $(STAMP) ## Say what this machine has, and what won't work on it
	$(Q)$(BIN)/python -m scripts.doctor --config $(KCONFIG_CONFIG)

.PHONY: probe
probe: $(STAMP) ## Measure each tier of this machine; plans are made by it from then on
	$(Q)$(BIN)/tierhints probe

##@ Clean

.PHONY: clean
clean: ## Remove caches; runs, data, .config and .venv stay
	$(Q)rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	$(Q)find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: mrproper
mrproper: clean ## Remove also .config and .venv; runs and data stay
	$(Q)rm -rf .venv .config .config.old defconfig

.PHONY: help
help: ## Show this text
	@awk -F ':.*## ' '/^##@ /{printf "\n%s\n", substr($$0, 5)} \
		/^[a-z%_-]+:.*## /{sub("%", "<name>", $$1); printf "  %-18s %s\n", $$1, $$2}' Makefile

$(STAMP): constraints.txt pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || \
		{ echo 'error: no $(PYTHON): install Python >= 3.11, or say make PYTHON=/path' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"error: $(PYTHON) is older than Python 3.11: say make PYTHON=/path/to/python3.11")'
	$(Q)$(PYTHON) -m venv .venv
	$(Q)$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(Q)touch $@
