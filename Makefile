# Every target works alone in a fresh clone: it makes .venv if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Says what it does, and that it still does it.
PROGRESS := $(PYTHON) .ci/with_progress.py
PIP_INSTALL := -m pip install --disable-pip-version-check --progress-bar raw

# The oldest and the newest transformers that the package supports, beside the pinned one.
FLOOR := 5.17.0
NEWEST := 5.24.0
MATRIX := tests/model tests/inference tests/processing tests/export tests/pipeline tests/teachers \
	tests/distill/test_in_place_device_waits.py tests/distill/test_module_overrides.py \
	tests/distill/test_call_arguments.py

.PHONY: setup check test test-floor test-newest test-matrix conformance demo smoke format clean \
	release release-check

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-dev.txt
	@echo "setting up $(VENV); a minute or two, with a slow network longer"
	@$(PROGRESS) "1 of 4: making $(VENV)" $(PYTHON) -m venv $(VENV)
	@$(PROGRESS) "2 of 4: pip itself" $(BIN)/python -m pip install --upgrade pip
	@$(PROGRESS) "3 of 4: torch" $(BIN)/python $(PIP_INSTALL) --constraint constraints-dev.txt torch
	@$(PROGRESS) "4 of 4: mmmamba and its tools" \
		$(BIN)/python $(PIP_INSTALL) --constraint constraints-dev.txt --editable '.[dev]'
	@touch $(STAMP)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup
	$(BIN)/python -m pytest -n auto

# An environment with the pinned versions of everything but transformers and what it pins itself.
.venv-transformers-%/.ready: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet)==' constraints-dev.txt > $(@D)/constraints.txt
	echo 'transformers==$*' >> $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable '.[dev]'
	touch $@

test-floor: .venv-transformers-$(FLOOR)/.ready
	$(<D)/bin/python -m pytest -n auto $(MATRIX)

test-newest: .venv-transformers-$(NEWEST)/.ready
	$(<D)/bin/python -m pytest -n auto $(MATRIX)

test-matrix: test-floor test-newest

# transformers' own common tests. TRANSFORMERS_TESTS may name a checkout of transformers, which adds
# the generation tests.
conformance: setup
	MMMAMBA_UPSTREAM_TESTS=$$($(BIN)/python tests/conformance/upstream.py) \
		$(BIN)/python -m pytest -n auto tests/conformance

demo: setup
	$(BIN)/python benchmarks/demo.py

smoke: setup
	$(BIN)/python benchmarks/smoke.py --mmmamba $(BIN)/mmmamba

# The wheel and the source distribution in dist/, checked as a package index does. Nothing is uploaded.
RELEASE := .venv-release
$(RELEASE)/.ready: constraints-dev.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --upgrade pip
	$(RELEASE)/bin/python -m pip install --quiet --constraint constraints-dev.txt build twine
	touch $@

release: $(RELEASE)/.ready
	rm -rf dist
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*

# Both installed into an empty environment of PYTHON, where the README's commands run from an empty
# folder, in minutes. TORCH names the torch to install first: TORCH=torch==2.13.0.
release-check: release
	$(RELEASE)/bin/python benchmarks/wheel_check.py dist/*.whl --sdist dist/*.tar.gz \
		--python $(PYTHON) $(if $(TORCH),--torch '$(TORCH)')

clean:
	rm -rf $(VENV) $(RELEASE) .venv-transformers-* build dist *.egg-info
