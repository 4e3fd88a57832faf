#!/usr/bin/env bash
# Fine-tunings as a job array, each on one GPU. First ask how many there are, with the same arguments:
#   sctd finetune runs/base --task glue --task superglue --data-dir /data --seeds 5 --count
# For 50, the array is 0-49; here at most 16 run at a time:
#   CHECKPOINT=runs/base TASKS="glue superglue" DATA=/data ARGS="--seeds 5" sbatch --array=0-49%16 slurm/finetune_array.sh
# Afterwards the first command without --count prints the table. Submit from the project's folder. Options on sbatch's
# command line win over the lines below. Submit it again with the same variables to run what is missing.
#
#   CHECKPOINT  run, checkpoint folder of a run, transformers folder or hub id
#   TASKS       tasks, suites and YAML files, separated by spaces or lines
#   DATA        folder of the tasks' files; default: the hub's, which needs HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0
#   OUT         folder of the results, on a disk that all nodes share; default: RUN/evaluation/step-N
#   ARGS        further options, as for `sctd finetune`      SRUN_ARGS  for srun, such as a container
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%a.log
set -uo pipefail
# shellcheck source=slurm/env.sh
. slurm/env.sh

if [ -z "${CHECKPOINT:-}" ] || [ -z "${TASKS:-}" ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "slurm/finetune_array.sh: CHECKPOINT, TASKS or --array is not set: see the first lines of the script" >&2
  exit 2
fi
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

read -r -d '' -a tasks <<<"$TASKS" # split into words, without expanding globs
command=(sctd finetune "$CHECKPOINT")
for task in "${tasks[@]}"; do command+=(--task "$task"); done
[ -n "${DATA:-}" ] && command+=(--data-dir "$DATA")
[ -n "${OUT:-}" ] && command+=(--out "$OUT")

echo "$(date -Is) job $SLURM_JOB_ID, attempt $((${SLURM_RESTART_COUNT:-0} + 1)): ${command[*]} ${ARGS:-} --cell $SLURM_ARRAY_TASK_ID"
# shellcheck disable=SC2086 # ARGS and SRUN_ARGS are lists of words
srun ${SRUN_ARGS:-} "${command[@]}" ${ARGS:-} --cell "$SLURM_ARRAY_TASK_ID"
code=$?
echo "$(date -Is) srun ended with exit code $code"
exit "$code" # 0: done, now or earlier. 2: bad input, or a loss that is not finite. Else: killed, or the program failed.
