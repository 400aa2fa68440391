#!/usr/bin/env bash
# Several hosts through DeepSpeed's default launcher, pdsh over ssh; on one of them: launch/pdsh.sh RECIPE key=value…
set -euo pipefail

# --- yours ---
HOSTFILE=${HOSTFILE:-launch/hostfile.example}
MASTER_ADDR=${MASTER_ADDR:-10.77.0.1}   # address of the hostfile's first host, as the others reach it
INTERFACE=${INTERFACE:-eth0}            # network interface that joins the hosts
VENV=${VENV:-.venv}                     # the same path on all hosts, as the repository's
FORWARD=${FORWARD:-OMP_NUM_THREADS DS_ACCELERATOR HF_HOME}   # what else of this shell's environment all hosts get
# -------------

cd "$(dirname "$0")/.."
source "$VENV/bin/activate"
# pdsh itself forwards MLFLOW_*, PYTHON* and, on GPUs, NCCL*. All else goes by a file that DeepSpeed reads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
export DS_ENV_FILE=${TMPDIR:-/tmp}/$(id -un).deepspeed_env
for name in GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME $FORWARD; do
    if [ -n "${!name:-}" ]; then echo "$name=${!name}"; fi
done >"$DS_ENV_FILE"
# A host that is cut off must not keep pdsh waiting for ever.
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ServerAliveCountMax=6"
exec deepspeed --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR" launch/train.py "$@"
