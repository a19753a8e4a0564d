# What people type. `make` alone lists it.
.PHONY: help install demo test check site wheel
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## / - /'

install:  ## the package with all that tests, linters and the site need
	pip install -e ".[dev,docs]"

demo:  ## train a poisoned classifier, repair it, detect its triggers: about two minutes
	python defend.py attack=badnet defense=mmdf

test:  ## all tests
	pytest

check:  ## linters and types
	ruff check .
	ruff format --check .
	mypy

site:  ## the documentation, into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 mkdocs build

wheel:  ## source and wheel into dist/; the wheel is tried in a fresh environment
	sh .ci/wheel
