#!/usr/bin/env bash
# Several hosts through MPICH's mpirun (Hydra), started by DeepSpeed, on one of them: launch/mpich.sh RECIPE key=value…
set -euo pipefail

# --- yours ---
HOSTFILE=${HOSTFILE:-launch/hostfile.example}
MASTER_ADDR=${MASTER_ADDR:-10.77.0.1}   # address of the hostfile's first host, as the others reach it
INTERFACE=${INTERFACE:-eth0}            # network interface that joins the hosts
VENV=${VENV:-.venv}                     # the same path on all hosts, as the repository's
# -------------

cd "$(dirname "$0")/.."
source "$VENV/bin/activate"
# Hydra forwards the whole environment.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
exec deepspeed --launcher mpich --launcher_args " -iface $INTERFACE" --hostfile "$HOSTFILE" \
    --master_addr "$MASTER_ADDR" launch/train.py "$@"
