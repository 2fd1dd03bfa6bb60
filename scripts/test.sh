#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up, lint, check the types and the documentation, then test: what continuous integration does.
#   bash scripts/test.sh [arguments of pytest]     for example tests/test_engine.py -k row
#   CHECKS="lint tests" bash scripts/test.sh       some of lint, types, docs, tests; or gpu (the tests that need one), or
#                                                nightly (the slow tests too, and properties on more examples)
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
        # A worker for each core and one more, since tests wait a third of their time for a browser, a server or a process.
        # Each has one thread: small tensors gain nothing from more. Each takes a part of the tests in their order, which
        # share what a module or a folder sets up, and one without work takes over some of another's. The environment may
        # say that modules are not to be compiled once; tests start a hundred processes.
        tests | nightly)
            types_done
            selected="not gpu and not slow"
            [[ $check == tests ]] || selected="not gpu"
            cores=$(getconf _NPROCESSORS_ONLN)
            PYTHONDONTWRITEBYTECODE="" OMP_NUM_THREADS=1 FASTDLLM_TESTS=$check \
                python -m pytest -q -m "$selected" -n $((cores < 8 ? cores + 1 : 8)) --dist worksteal "$@"
            ;;
        gpu)
            types_done
            python -m pytest -q -m gpu "$@"
            ;;
        *)
            echo "test.sh: unknown check '$check'; allowed are lint, types, docs, tests, nightly, gpu" >&2
            exit 2
            ;;
    esac
done
types_done
