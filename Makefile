# The README's two commands are `make rlhf` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build where an index offers it (several GB smaller); any torch that pyproject.toml admits otherwise.
TORCH ?= torch>=2.11,<2.14

# Everything in tests/faults; `make faults FAULTS=few` takes a sample of each in a few minutes.
FAULTS ?= all

SHAKESPEARE ?= ../shared/data/text/tinyshakespeare.txt

.PHONY: rlhf shakespeare test slow faults processes lint install

rlhf: $(VENV)/.installed
	$(BIN)/python recipes/rlhf.py --config recipes/configs/tiny/rlhf.yaml

# Tiny-shakespeare, its first 90 % to train on: 1,115,394 bytes, a text of your own by SHAKESPEARE=FILE.
shakespeare: $(VENV)/.installed
	mkdir -p runs/text/shakespeare
	size=$$(wc -c < $(SHAKESPEARE)) && cut=$$((size * 9 / 10)) && head -c $$cut $(SHAKESPEARE) > runs/text/shakespeare/train.txt \
		&& tail -c +$$((cut + 1)) $(SHAKESPEARE) > runs/text/shakespeare/validation.txt
	$(BIN)/python recipes/rlhf.py --config recipes/configs/shakespeare/rlhf.yaml --to pretrain

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --durations=10

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow" --timeout=1800 --durations=0

faults: $(VENV)/.installed-test
	FAULTS=$(FAULTS) $(BIN)/python -m pytest tests/faults -m faults --timeout=1800 -n auto --maxprocesses 4 --dist loadfile

processes: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/processes -m processes --durations=5

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,rustbpe,vision]"
	touch $@
