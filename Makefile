# `make study` runs the main job, `make test` the tests; each does all of its own set-up on a fresh machine.
PRESET ?= study
CORPUS ?= embedded
VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=
PY     := $(VENV)/bin/python
export PYTHONHASHSEED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: study test lab bench fuzz verify recheck archive setup clean help

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(VENV)/.ready ## virtual environment, Python packages and, as root or with sudo, Debian packages

$(VENV)/.ready: pyproject.toml setup.sh
	@PYTHON=$(PYTHON) VENV=$(VENV) sh setup.sh
	@touch $@

study: setup ## the whole study: reports/index.html   (PRESET=smoke|study|full|paper, CORPUS=..., ARGS=...)
	@$(PY) -m lib study --preset $(PRESET) --set data.corpus=$(CORPUS) $(ARGS)

test: setup ## style, unit and property tests, and every notebook at the smoke preset on real speech
	@$(VENV)/bin/ruff check .
	@$(PY) -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lab: setup ## JupyterLab on the notebooks
	@cd notebooks && ../$(VENV)/bin/jupyter lab

bench: setup ## ratios of speed measured in one run
	@$(PY) benchmarks/bench.py $(ARGS)

fuzz: setup ## fuzz the audio reader and the checkpoint loader for a fixed budget
	@FUZZ_EXAMPLES=3000 $(PY) -m pytest tests/test_fuzz.py $(ARGS)

verify: setup ## compare the tables of the last run with reports/reference
	@$(PY) -m lib verify --preset $(PRESET) $(ARGS)

recheck: setup ## rebuild every table of the reference run that is made of scores, from its score files; no audio is needed
	@$(PY) -m lib verify --scores

archive: ## the whole report of the last run, with the reference tables it links to, as report.tar.gz for a release
	@test -f reports/index.html || { echo "error: no report here; make it first: make study"; exit 1; }
	@cd reports && tar -czf ../report.tar.gz index.html html figures tables reference
	@ls -sh report.tar.gz

clean: ## what the study generated; downloads and the virtual environment stay
	rm -rf runs reports/index.html reports/html reports/executed reports/figures reports/pdf reports/tables \
	  report.tar.gz data/clips
