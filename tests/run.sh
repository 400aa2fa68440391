#!/usr/bin/env bash
# The whole suite: lint, format, types, tests. Arguments go to pytest: ./tests/run.sh -k timeline
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.lock requirements-dev.lock
export OMP_NUM_THREADS=1 # two cores, several processes: more threads only get in each other's way
mypy &
ruff check .
ruff format --check .
codespell
vulture
wait $!
# Two tests at a time; those of a file, with its fixtures, on one worker (tests/conftest.py).
pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
