# make train   a first run: real text, a small Llama, every script, in ten minutes on two cores
# make test    linters, type checker and all tests
PYTHON ?= python3
VENV := .venv
RUN := . $(VENV)/bin/activate &&

.PHONY: train test lint

$(VENV)/installed: requirements.txt
	@echo "installing torch and the other packages into $(VENV), which takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

train: $(VENV)/installed
	$(RUN) examples/first_run.sh

lint: $(VENV)/installed
	$(RUN) ruff check . && ruff format --check . && mypy

test: lint
	$(RUN) python -m pytest -n 2 --dist loadfile -m "not quiet" && \
	python -m pytest -m quiet $$(grep -rl "pytest.mark.quiet" tests --include="test_*.py")
