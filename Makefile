# Thin on purpose: the README says what each target runs, for people without make.
PYTHON ?= python3
ARGS ?=

.PHONY: demo test test-light check coverage install

demo:  ## quantize, serve and ask a small model (ARGS=--once: exit after the table)
	@$(PYTHON) deploy/install.py demo
	@.venv/bin/quantgate demo $(ARGS)

test:  ## everything that CI runs, with real vLLM
	@$(PYTHON) deploy/install.py test
	@.venv/bin/python -m tests.run $(ARGS)

test-light:  ## the tests that need neither vLLM nor a model
	@$(PYTHON) deploy/install.py test
	@.venv/bin/python -m tests.run --light $(ARGS)

check:  ## formatting, lint, types, import contracts
	@$(PYTHON) deploy/install.py test
	@.venv/bin/python -m tests.run --check

coverage:  ## branch coverage of the light tests
	@$(PYTHON) deploy/install.py test
	@.venv/bin/python -m tests.run --coverage $(ARGS)

install:  ## core only: the gateway, without torch and vLLM
	@$(PYTHON) deploy/install.py core
