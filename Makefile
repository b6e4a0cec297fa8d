# Thin on purpose: the README says what each target runs, for people without make.
PYTHON ?= python3
ARGS ?=

.PHONY: demo test check install

demo:  ## quantize, serve and ask a small model (ARGS=--once: exit after the table)
	@$(PYTHON) deploy/install.py demo
	@.venv/bin/quantgate demo $(ARGS)

test:  ## everything that CI runs, with real vLLM
	@$(PYTHON) deploy/install.py test
	@.venv/bin/python -m tests.run $(ARGS)

check:  ## the fast checks only
	@$(PYTHON) deploy/install.py test
	@.venv/bin/python -m tests.run --check

install:  ## core only: the gateway, without torch and vLLM
	@$(PYTHON) deploy/install.py core
