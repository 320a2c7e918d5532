# `make test` and `make book` set everything up by themselves. Variables: PYTHON (3.11 or newer), PYTEST (extra flags).
PYTHON ?= python3
PYTEST ?= -n 2 --dist loadfile
PROFILE ?= full
BIN := .venv/bin
PACKAGES := -e '.[triton,book,test,peers]' -e lab

.DEFAULT_GOAL := help
.PHONY: help setup lint test test-slow test-gpu gpu test-cluster test-recipes experiment bench book site serve notebooks notebook-check address times test-book pdf speed links newest release attach clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

# The stamp makes the environment once; it is made again only when what it should hold changes.
.venv/.ready: pyproject.toml lab/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version + "; try: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv: a few minutes and, with CUDA's libraries on Linux, 7 GB of disk."
	@$(PYTHON) -c 'import shutil; free = shutil.disk_usage(".").free / 1e9; print(f"{free:.0f} GB are free here." + (" That may not be enough: pip also needs room for the 3 GB it downloads." if free < 11 else ""))'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt $(PACKAGES)
	@touch $@

setup: .venv/.ready  ## the environment .venv, reused when up to date

lint: .venv/.ready  ## ruff (lint and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, types and every test but the slow and the GPU ones
	@echo "The tests take about nine minutes on two cores."
	$(BIN)/python -m pytest $(PYTEST)

test-slow: .venv/.ready  ## the tests that take minutes: inductor, sampling statistics, large sizes
	$(BIN)/python -m pytest -m slow $(PYTEST)

test-gpu: .venv/.ready  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -n 0

# Steps that stand apart, each with its own limit: `.venv/bin/python -m bench.gpu STEP` runs one, also without make.
gpu: .venv/.ready  ## all that needs a GPU: correctness, benchmark, training from pixels; results in _build/gpu
	$(BIN)/python -m bench.gpu --out _build/gpu

# Ray, and the libraries of the recipes, have environments of their own, which borrow every other package from .venv.
.venv-%/.ready: .venv/.ready
	test -x .venv-$*/bin/python || $(BIN)/python -m venv .venv-$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth
	extra=$$($(BIN)/python -c 'import tomllib; print(*{name: extra for path in ("pyproject.toml", "lab/pyproject.toml") for name, extra in tomllib.load(open(path, "rb"))["project"]["optional-dependencies"].items()}["$*"])') && .venv-$*/bin/python -m pip install --disable-pip-version-check $$extra
	@touch $@

test-recipes: .venv-recipes/.ready  ## the recipes with Lightning, Hugging Face and skorch installed
	.venv-recipes/bin/python -c 'import lightning, skorch, transformers'
	.venv-recipes/bin/python -m pytest tests/test_recipes.py

test-cluster: .venv-cluster/.ready  ## the Ray engine on a cluster of two nodes on this machine
	.venv-cluster/bin/python -m pytest -m '' lab/tests/test_sweep.py -k ray $(PYTEST)

# CHAPTER: a notebook's name without its ending; PROFILE: smoke, laptop or full. What is stopped goes on when the command
# is given again; `python -m topk_lab gather CHAPTER` then puts the new records into the chapter's table.
experiment: .venv/.ready  ## run what has no record yet of CHAPTER's experiments, and its figures from all of them
	$(if $(CHAPTER),,$(error CHAPTER is missing, such as CHAPTER=14_cifar100))
	mkdir -p _build/experiments
	$(BIN)/papermill notebooks/$(CHAPTER).ipynb _build/experiments/$(CHAPTER).ipynb -p profile $(PROFILE) -p records run -k python3 --log-output

bench: .venv/.ready  ## time and memory beside the peers on this machine, into bench/results/
	$(BIN)/python -m bench --suite cpu

# Variables of the book: JOBS (notebooks at a time), PORT.
book: .venv/.ready  ## run every chapter that changed in its smallest size, build the book strictly, print its address
	$(BIN)/python -m book.pipeline build $(if $(JOBS),--jobs $(JOBS))

site: .venv/.ready  ## the book from the committed outputs, nothing runs
	$(BIN)/python -m book.pipeline site

serve: book  ## build the book and open it in a browser
	$(BIN)/python -m book.pipeline serve $(if $(PORT),--port $(PORT))

notebooks: .venv/.ready  ## write the committed .ipynb again, with outputs of the laptop profile
	$(BIN)/python -m book.pipeline notebooks $(if $(JOBS),--jobs $(JOBS))

notebook-check: .venv/.ready  ## every .ipynb agrees with its text twin and has its outputs
	$(BIN)/python -m book.pipeline check

address: .venv/.ready  ## after a change of address, release or record: write every generated place again
	$(BIN)/python -m book.pipeline address

times: .venv/.ready  ## run every notebook alone, note how long it takes, say so in the texts
	$(BIN)/python -m book.pipeline times

# CHROMIUM: path of the browser, if it is not found by itself; SHOTS: a folder for pictures of every page.
test-book: site  ## the built pages in a real browser, and a notebook on a stand-in for Colab
	$(BIN)/python -m book.pipeline.browser $(if $(SHOTS),--shots $(SHOTS)) $(if $(CHROMIUM),--chromium $(CHROMIUM))
	$(BIN)/python -m pytest -m slow tests/test_colab.py

pdf: site  ## the book and the cheat sheet as PDF, printed by the browser: _build/topk-*.pdf
	$(BIN)/python -m book.pipeline.printing $(if $(CHROMIUM),--chromium $(CHROMIUM))

speed: site  ## how fast the heaviest page appears on a slow phone, and how much it shifts
	$(BIN)/python -m book.pipeline.speed $(if $(CHROMIUM),--chromium $(CHROMIUM))

links: site  ## every link that leads out of the book (needs a network)
	$(BIN)/python -m book.pipeline.links

newest:  ## run and build the book with the newest release of every package, in an environment of its own
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check --upgrade --upgrade-strategy eager $(PACKAGES)
	.venv-newest/bin/python -m book.pipeline build $(if $(JOBS),--jobs $(JOBS))

# TAG: the tag of the release, v and its number.
release: pdf  ## the files of a release, into _build/release/
	$(BIN)/python -m book.pipeline release $(TAG)

attach: release  ## publish the release TAG with its files (needs gh and its token)
	gh release create $(TAG) --verify-tag --generate-notes _build/release/*

clean:  ## remove what was built, keep .venv
	rm -rf _build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
