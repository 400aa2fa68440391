#!/usr/bin/env bash
# The whole suite: lint, format, types, tests. Arguments go to pytest: ./tests/run.sh -k timeline
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.lock requirements-dev.lock
export OMP_NUM_THREADS=1 # two cores, several processes: more threads only get in each other's way
ruff check .
ruff format --check .
mypy
codespell
vulture
# Tests of one process leave the second core idle: two at a time, the tests of a file on one worker, with its fixtures.
# Those that start several processes, of which some watch the clock, run alone.
run() { pytest "$@" || [ $? -eq 5 ]; } # 5: the arguments select none of these tests
run -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not dist" "$@"
run -m "dist and not slow" "$@"
