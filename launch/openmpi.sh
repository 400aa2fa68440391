#!/usr/bin/env bash
# Several hosts through OpenMPI's mpirun, started by DeepSpeed, on one of them: launch/openmpi.sh RECIPE key=value…
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
# DeepSpeed makes `mpirun -x` of MLFLOW_*, PYTHON*, UCX* and of what is in this file; mpirun does not tell the address.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
export DS_ENV_FILE=${TMPDIR:-/tmp}/$(id -un).deepspeed_env
for name in MASTER_ADDR GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME $FORWARD; do
    if [ -n "${!name:-}" ]; then echo "$name=${!name}"; fi
done >"$DS_ENV_FILE"
# mpirun's own words go over the same interface; and no process is bound to one core, which it would do by itself.
options="--mca btl_tcp_if_include $INTERFACE --mca oob_tcp_if_include $INTERFACE --bind-to none ${MPIRUN_OPTIONS:-}"
exec deepspeed --launcher openmpi --launcher_args "$options" --hostfile "$HOSTFILE" --master_addr "$MASTER_ADDR" \
    launch/train.py "$@"
