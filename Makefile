# make demo    one concept erased, attacked, scored and reported, from a fresh clone
# make test    ruff, mypy and pytest
# make check   the same without the set-up: for a working tree that is installed
#              (where runs/demo is of other settings or versions it stops and says so: `make clean`, then again)
# make torture the long forms: runs that are killed a hundred times end with the same bytes, and 100,000 hostile files (minutes for the first, a quarter of an hour for the second).
#              With TORTURE_SEED=N they are killed at the same operations again. What they counted goes to docs/results/torture.json; hostile files
#              that were stopped are gone on with by the same command (runs/torture)
# make tune    search the values of toybox-fire-dpop again (hours)
# make results make the published numbers again but for those that docs/results.md lists (hours)
# make figure4 the trade-off of every method on the embedded model, on all cores (hours). Cells that are finished in docs/results are kept; with
#              RESULTS=DIR everything is made from nothing, there
# make ablations  the same for what of DUO does what
# make beyond  the same for objectives beyond DUO's, and what the study of them minimises (docs/beyond.md)
# make relearning  erasures against fine-tuning, beside a model that never saw the concept (docs/beyond.md)
# make hardening  DUO hardened in rounds, every round put to the red team, for docs/hardening.md (hours)
# make floor   what the judges call spoiled where nothing was erased, beside redirection (docs/beyond.md; half an hour)
# make red-team  every method's erasure against every attack, on the quick budget (docs/red-team.md; hours)
# make growth  how seconds and memory grow with pairs, prompts, cells, processes and images (stops after 15 minutes with what is left; goes on
#              where it was stopped). With GROWTH="--largest 100000 --budget 600" up to the largest (hours)
# make bench   our loops beside the peers' on the embedded model, and on real sizes where there is a GPU: docs/results/speed.json and
#              the table of docs/performance.md (on a busy machine its numbers are worth nothing)
# make versions  the suite on the lowest and on the newest versions that pyproject.toml allows, logs in docs/results/versions (hours)
# make lock    write requirements/*.txt, the hashes that set-up installs by, from constraints.txt
# make clean   remove what these made, .venv and runs/demo included

# Set-up installs files whose SHA-256 is in requirements/ and no others. `make demo HASHES=` installs by the versions of constraints.txt
# alone: for an index with builds of its own, or a system for which a package has no wheel.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
HASHES ?= yes
LISTED = $(PIP) --require-hashes --no-deps --only-binary :all: -r requirements/$(1).txt
BY_HASH = $(LISTED) || { echo \
  "set-up stopped: pip could not install requirements/$(1).txt by its hashes, for the reason above. Where you trust your index: make HASHES= $(MAKECMDGOALS)" >&2; exit 1; }
TORCH_HAS_CUDA = $(BIN)/python -c 'import importlib.metadata as m; raise SystemExit(not any("nvidia" in one for one in m.requires("torch")))'

.PHONY: demo test check torture bench clean tune results figure4 ablations beyond relearning hardening floor red-team growth versions lock

demo: .venv/installed
	$(BIN)/duo run toybox-fire --out runs/demo --resume

test: .venv/installed-test
	@$(MAKE) --no-print-directory check

check:
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto --maxprocesses 4 --dist loadfile

torture: .venv/installed-test
	$(BIN)/python tests/torture.py

tune: .venv/installed
	$(BIN)/python benchmarks/tune.py --out runs/tune

bench: .venv/installed-test
	$(BIN)/python benchmarks/speed.py --memory --out docs/results/speed.json --docs docs/performance.md

results: .venv/installed
	$(BIN)/python benchmarks/results.py --out runs/results --docs docs/results
	$(BIN)/python benchmarks/budgets.py --out runs/budgets --docs docs/results
	$(BIN)/python benchmarks/agreement.py compare --labels docs/results/labels.csv --docs docs/results

figure4 ablations beyond relearning: RESULTS ?= docs/results/$@
figure4 ablations beyond relearning: .venv/installed-test
	$(BIN)/duo bench toybox-$@ --out runs/$@ --results $(RESULTS) --engine ray
	$(TABLES)

figure4 ablations: TABLES = cp $(RESULTS)/figure4.svg docs/$@.svg
relearning: TABLES = $(BIN)/python benchmarks/relearning.py $(RESULTS)
beyond: TABLES = $(BIN)/duo bench toybox-figure4 --only redirect/0.001,duo/0.001,duo-penalty/0.00051 --out runs/figure4 \
  --results $(SCORED) --engine ray && $(BIN)/python benchmarks/beyond.py $(RESULTS) --scored $(SCORED)
beyond: SCORED ?= docs/results/figure4

# Erasures of three seeds; what is there is not made again.
floor: .venv/installed-test
	for seed in 0 1 2; do for verb in pairs erase; do \
	  $(BIN)/duo $$verb toybox-fire --set erase_seed=$$seed --out runs/floor/seed-$$seed || exit; done; done
	for verb in pairs erase; do $(BIN)/duo $$verb toybox-fire-published --out runs/floor/duo || exit; done
	$(BIN)/python benchmarks/floor.py --erased "DUO, seed 0=runs/floor/duo/erase/delta.safetensors" $(foreach seed,0 1 2,--erased "redirect, seed $(seed)=runs/floor/seed-$(seed)/erase/delta.safetensors")

red-team: .venv/installed-test
	$(BIN)/python benchmarks/methods.py compare --out runs/methods
	$(BIN)/python benchmarks/red_team.py --out runs/methods
	for recipe in toybox-fire toybox-fire-published; do for verb in pairs erase; do \
	  $(BIN)/duo $$verb $$recipe --out runs/red-team/$$recipe || exit; done; done
	$(BIN)/python benchmarks/red_team.py --run redirect=runs/red-team/toybox-fire --run published=runs/red-team/toybox-fire-published

hardening: .venv/installed
	$(BIN)/python benchmarks/hardening.py --out runs/hardening

growth: .venv/installed-test
	$(BIN)/python benchmarks/growth.py $(GROWTH)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "duo needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

ifneq ($(HASHES),)
.venv/installed: .venv/bin/python pyproject.toml constraints.txt requirements/core.txt requirements/torch-cpu.txt requirements/cuda.txt
	@$(call LISTED,torch-cpu) 2>/dev/null || echo "the build of torch without CUDA in requirements/torch-cpu.txt cannot be had here: the index's own is installed"
	@$(call BY_HASH,core)
	@if $(TORCH_HAS_CUDA); then $(call BY_HASH,cuda); fi
	$(PIP) --no-index --no-deps --no-build-isolation -e .
	@$(BIN)/pip check --disable-pip-version-check
	@touch $@

.venv/installed-test: .venv/installed requirements/test.txt
	@$(call BY_HASH,test)
	@$(BIN)/pip check --disable-pip-version-check
	@touch $@
else
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) -c constraints.txt -e '.[test,nudenet,app,ray]'
	@touch $@
endif

versions: .venv/installed-test
	$(BIN)/python benchmarks/versions.py lowest
	$(BIN)/python benchmarks/versions.py newest

lock: .venv/installed-test
	$(PIP) uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/lock.py

clean:
	rm -rf .venv runs/demo build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
