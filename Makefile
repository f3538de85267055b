# make demo    one concept erased, attacked, scored and reported, from a fresh clone
# make test    ruff, mypy and pytest
# make check   the same without the set-up: for a working tree that is installed
#              (where runs/demo is of other settings or versions it stops and says so: `make clean`, then again)
# make torture the long forms: runs that are killed a hundred times end with the same bytes, and 100,000 hostile files (an hour or so).
#              With TORTURE_SEED=N they are killed at the same operations again. What they counted goes to docs/results/torture.json; hostile files
#              that were stopped are gone on with by the same command (runs/torture)
# make tune    search the demo's values again (hours)
# make results make the published numbers again but for those that docs/results.md lists (hours)
# make figure4 the trade-off of every method on the embedded model, on all cores (hours). Cells that are finished in docs/results are kept; with
#              RESULTS=DIR everything is made from nothing, there
# make ablations  the same for what of DUO does what
# make beyond  the same for objectives beyond DUO's, and what the study of them minimises (docs/beyond.md)
# make hardening  DUO hardened in rounds, every round put to the red team, for docs/hardening.md (hours)
# make clean   remove what these made, .venv and runs/demo included

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check torture clean tune results figure4 ablations beyond hardening

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

results: .venv/installed
	$(BIN)/python benchmarks/results.py --out runs/results --docs docs/results
	$(BIN)/python benchmarks/budgets.py --out runs/budgets --docs docs/results
	$(BIN)/python benchmarks/agreement.py compare --labels docs/results/labels.csv --docs docs/results

figure4 ablations beyond: RESULTS ?= docs/results/$@
figure4 ablations beyond: .venv/installed-test
	$(BIN)/duo bench toybox-$@ --out runs/$@ --results $(RESULTS) --engine ray
	$(if $(filter beyond,$@),$(BIN)/python benchmarks/beyond.py $(RESULTS),cp $(RESULTS)/figure4.svg docs/$@.svg)

hardening: .venv/installed
	$(BIN)/python benchmarks/hardening.py --out runs/hardening
	cp docs/results/hardening.svg docs/hardening.svg

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "duo needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,nudenet,app,ray]'
	@touch $@

clean:
	rm -rf .venv runs/demo build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
