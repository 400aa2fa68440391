#!/usr/bin/env bash
# The whole suite: lint, format, types, tests. Arguments go to pytest: ./tests/run.sh -k timeline
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.lock requirements-dev.lock
export OMP_NUM_THREADS=1 # two cores, several processes: more threads only get in each other's way
ruff check .
ruff format --check .
mypy
# Two at a time: tests of one process leave the second core idle. A file stays on one worker, with its fixtures.
pytest -n 2 --dist loadfile "$@"
