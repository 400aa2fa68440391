#!/usr/bin/env bash
# Several hosts in a Slurm job: sbatch launch/slurm.sh RECIPE key=value…
#SBATCH --job-name=qatscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
# --signal: to every task, 10 minutes before the end: the run saves and leaves with 75, and is put in the queue again.
set -uo pipefail

# --- yours ---
INTERFACE=${INTERFACE:-eth0}            # network interface that joins the hosts
VENV=${VENV:-.venv}                     # the same path on all hosts
# -------------

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
source "$VENV/bin/activate"
export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# srun forwards the whole environment and tells each task its number and the hosts; launch/train.py reads them. Tasks end
# each other by themselves: srun waits for all, for the codes of tasks that it killed would hide the 75.
srun --kill-on-bad-exit=0 --wait=120 python -u launch/train.py "$@"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
