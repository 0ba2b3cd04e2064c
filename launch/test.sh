#!/usr/bin/env bash
# The gate: formatting, lint, types, tests. Stops at the first step that fails and says which. Arguments go to pytest:
#
#   launch/test.sh tests/unit -k plan
#   launch/test.sh -n 0 -m gpu
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

step() {
    local name="$1" start took seconds status=0
    shift
    start="$(date +%s%3N)"
    "$@" || status=$?
    took=$(($(date +%s%3N) - start))
    seconds="$((took / 1000)).$((took / 100 % 10))"
    if ((status != 0)); then
        echo "test: $name FAILED after $seconds s (exit code $status)" >&2
        exit "$status"
    fi
    echo "test: $name passed in $seconds s"
}

cd "$ROOT"
step format "$VENV_PYTHON" -m ruff format --check --quiet --output-format=concise .
step lint "$VENV_PYTHON" -m ruff check --quiet --output-format=concise .
step types "$VENV_PYTHON" -m mypy --no-error-summary
step tests "$VENV_PYTHON" -m pytest -q -n auto "$@"
