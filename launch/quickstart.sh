#!/usr/bin/env bash
# From a clone to a first result: installs from the lock, then runs the main job on text that is already here.
# Everything it writes lands in the folder given (default: outputs/quickstart); a second start reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.lock
exec qatscale quickstart "$@"
