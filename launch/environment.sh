# Sourced by quickstart.sh and tests/run.sh: makes .venv from a lock and puts it on the PATH.
# usage: source launch/environment.sh [requirements.lock …]     QATSCALE_VENV names another folder than .venv

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${QATSCALE_VENV:-$root/.venv}
python=${PYTHON:-python3}
locks=("$@")

fail() { echo "error: $*" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$python is $("$python" --version 2>&1); qatscale needs Python 3.11 or newer. Set PYTHON to one, e.g. PYTHON=python3.12"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
command -v c++ >/dev/null || command -v g++ >/dev/null ||
    fail "no C++ compiler found; DeepSpeed's installation needs one (Debian, Ubuntu: apt install g++)"

# The stamp names what was installed: an unchanged lock is not installed twice, a half-done install has no stamp.
wanted=$(cd "$root" && cat pyproject.toml "${locks[@]}" | cksum)
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing into $venv (torch, DeepSpeed, transformers, MLflow …; a few minutes, a few GB on a machine that takes CUDA builds)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    requirements=()
    for lock in "${locks[@]}"; do requirements+=(-r "$root/$lock"); done
    # torch first: what builds against it must see this one, and no resolver may choose another.
    "$venv/bin/python" -m pip install --disable-pip-version-check "$(grep -h '^torch==' "$root/requirements.lock")"
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --disable-pip-version-check "${requirements[@]}"
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps -e "$root"
    echo "$wanted" >"$venv/.installed"
fi
export PATH="$venv/bin:$PATH"
