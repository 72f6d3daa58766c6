# make demo   own virtual environment, install, then the main job on real images (CPU)
# make test   own virtual environment, install, then format check, lint, types and tests
# make format formats and mends what ruff can mend

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test format

demo: $(VENV)/.installed-train
	$(BIN)/localmamba demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 $(BIN)/pytest --numprocesses 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/pytest --numprocesses 2 --dist worksteal tests/ops

format: $(VENV)/.installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# One stamp for each set of extras, made anew when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/pip
	@echo "Installing localmamba[$*] into $(VENV) (PyTorch is large: this takes minutes the first time)"
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
