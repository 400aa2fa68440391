#!/usr/bin/env bash
# Make a virtual environment beside what this machine has: its torch and whatever else it has in a sufficient version,
# and the rest from wheels.sh's folder, without a network. usage: setup.sh VENV [FOLDER]; PYTHON: the one with torch.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
venv=${1:?usage: setup.sh VENV [FOLDER]}
wheels=${2:-$here/wheels}
python=${PYTHON:-python3}

"$python" -m venv --without-pip "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# --system-site-packages would not do where $python is of a virtual environment itself: it means the base's packages.
"$python" - >"$site/machine.pth" <<'PYTHON'
import site

folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
print("\n".join(f"import site; site.addsitedir({folder!r})" for folder in folders))
PYTHON
printf '%s\n' "$root" "$root/analysis" >"$site/qatscale.pth"

missing=$("$venv/bin/python" - "$here/requirements.txt" <<'PYTHON'
import re
import sys
from importlib.metadata import PackageNotFoundError, version


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)[:3]]


for line in open(sys.argv[1]):
    if match := re.match(r"([\w-]+)\s*(?:(==|>=)\s*([\d.]+))?", line):
        name, relation, wanted = match.groups()
        try:
            found = version(name)
            enough = not relation or (found == wanted if relation == "==" else numbers(found) >= numbers(wanted))
        except PackageNotFoundError:
            enough = False
        if not enough:
            print(name)
PYTHON
)
# A pydantic that is there goes with the pydantic-core that is there; of two halves from two places none would work.
if grep -qE '^pydantic(-core)?$' <<<"$missing"; then missing=$(printf '%s\n' $missing pydantic pydantic-core | sort -u); fi
echo "installing: ${missing:-nothing}" | tr '\n' ' '; echo
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 - one name a word
    "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check --no-index --no-deps \
        --ignore-installed --find-links "$wheels" $missing
fi
"$venv/bin/python" -c 'import torch, deepspeed, qatscale.train.loop; print("torch", torch.__version__, "DeepSpeed", deepspeed.__version__, "CUDA", torch.cuda.is_available())'
