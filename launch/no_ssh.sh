#!/usr/bin/env bash
# Several hosts without ssh: start this on every host, with its number from 0: launch/no_ssh.sh NUMBER RECIPE key=value…
set -euo pipefail

# --- yours ---
HOSTFILE=${HOSTFILE:-launch/hostfile.example}
MASTER_ADDR=${MASTER_ADDR:-10.77.0.1}   # address of the hostfile's first host, as the others reach it
INTERFACE=${INTERFACE:-eth0}            # network interface that joins the hosts
VENV=${VENV:-.venv}                     # the same path on all hosts, as the repository's
# -------------

cd "$(dirname "$0")/.."
source "$VENV/bin/activate"
number=$1
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
exec deepspeed --hostfile "$HOSTFILE" --no_ssh --node_rank "$number" --master_addr "$MASTER_ADDR" launch/train.py "$@"
