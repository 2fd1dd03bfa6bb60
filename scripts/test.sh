#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up, lint, check the types and the documentation, then test: what continuous integration does.
#   bash scripts/test.sh [arguments of pytest]     for example tests/test_engine.py -k row
#   CHECKS="lint tests" bash scripts/test.sh       some of lint, types, docs, tests, and gpu (the tests that need one)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Without arguments: those of this script are pytest's.
setup() { source scripts/setup_env.sh; }
setup

types=
# Ends with the exit code of mypy, if it runs.
types_done() { [[ -z $types ]] || wait "$types"; }
trap wait EXIT # what mypy found is told also where the documentation failed

for check in ${CHECKS:-lint types docs tests}; do
    case $check in
        lint)
            ruff check .
            ruff format --check .
            ;;
        types) mypy & types=$! ;; # beside the documentation: each keeps one core busy
        docs)
            site=$(mktemp -d)
            # Not --quiet: it hides the warnings from --strict, too.
            NO_MKDOCS_2_WARNING=1 mkdocs build --strict --site-dir "$site"
            rm -r "$site"
            ;;
        # A worker for each core, with one thread: small tensors gain nothing from more threads. Each takes a part of the
        # tests in their order, which share what a module or a folder sets up, and one without work takes over some of
        # another's. The environment may say that modules are not to be compiled once; tests start a hundred processes.
        tests)
            types_done
            cores=$(getconf _NPROCESSORS_ONLN)
            PYTHONDONTWRITEBYTECODE="" OMP_NUM_THREADS=1 \
                python -m pytest -q -m "not gpu and not slow" -n $((cores < 8 ? cores : 8)) --dist worksteal "$@"
            ;;
        gpu)
            types_done
            python -m pytest -q -m gpu "$@"
            ;;
        *)
            echo "test.sh: unknown check '$check'; allowed are lint, types, docs, tests, gpu" >&2
            exit 2
            ;;
    esac
done
types_done
