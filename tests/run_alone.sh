#!/usr/bin/env bash
# run_alone.sh FILE OPTIONS...: one test file in a process of its own, with its own coverage data and its output in one piece.
set -uo pipefail
output=$(mktemp); trap 'rm -f "$output"' EXIT
export OMP_NUM_THREADS=1  # another file is tested beside this one
COVERAGE_FILE=.coverage.${1//\//-} .venv/bin/python -m pytest "$@" >"$output" 2>&1
status=$?
cat "$output"
exit $status
