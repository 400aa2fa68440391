#!/usr/bin/env bash
# Workers of a study as a Slurm array, one a GPU: sbatch --array=0-15 launch/slurm_study.sh FOLDER
# Lay FOLDER out first (`qatscale study run STUDY.yaml --workers 0`, then Ctrl-C), on a disk that all hosts share.
# `qatscale study status FOLDER` shows all workers; `qatscale study run FOLDER --workers 0` ends it with fit and report.
#SBATCH --job-name=qatscale-study
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# --signal: 5 minutes before the end. The worker saves its run and leaves with 75; the job is put in the queue again.
set -uo pipefail

# --- yours ---
VENV=${VENV:-.venv}                     # the same path on all hosts
# -------------

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
source "$VENV/bin/activate"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
python -u -m qatscale study work "$1" &
worker=$!
trap 'kill -USR1 "$worker"' USR1
trap 'kill -TERM "$worker"' TERM
wait "$worker"
code=$?
while kill -0 "$worker" 2>/dev/null; do # a signal ended the wait, not the worker
    wait "$worker"
    code=$?
done
if [ "$code" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
