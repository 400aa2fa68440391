#!/usr/bin/env bash
# Collect wheels of requirements.txt, in the versions of the lock, for a machine of Linux, x86-64 and Python 3.12 that
# has torch and no network. usage: wheels.sh [FOLDER]; PYTHON names a Python with torch and setuptools (for DeepSpeed).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../../..
out=${1:-$here/wheels}
python=${PYTHON:-$root/.venv/bin/python}
names=$(sed 's/#.*//; s/[><= ].*//; /^$/d' "$here/requirements.txt")
mkdir -p "$out"

# pydantic takes exactly one pydantic-core, so versions are those of the lock, not the newest.
wanted=()
for name in $names; do
    line=$(grep -iE "^${name//-/[-_]}==" "$root/requirements.lock") || { echo "error: $name is not in requirements.lock" >&2; exit 2; }
    [ "$name" = deepspeed ] && deepspeed=$line || wanted+=("$line")
done
platforms=()
for glibc in 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$out" "${wanted[@]}"
# DeepSpeed comes as source; without its compiled operations, none of which is used here, the wheel fits any machine.
ls "$out"/deepspeed-*.whl >/dev/null 2>&1 ||
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$out" "$deepspeed"
du -sh "$out"
