# shellcheck shell=bash
# The common part of all pretraining jobs: sourced by pretrain_*.sh and by scripts of `sctd slurm`, not submitted itself.
#
#   RECIPE  recipe to train                      RUN     folder of the run; default runs/JOB-NAME
#   BRANCH_FROM  RUN@STEP to begin at instead, with the settings of that run
#   CORPUS  folder made by `sctd prepare`        ARGS    overrides, as for `sctd pretrain`
#   DEEPSPEED_CONFIG  a JSON of ds_configs/      SRUN_ARGS  for srun, such as a container
#   MAX_FAILURES  attempts in a row that may fail without a new checkpoint; default 3
set -uo pipefail
# shellcheck source=slurm/env.sh
. slurm/env.sh

RUN=${RUN:-runs/$SLURM_JOB_NAME}
mkdir -p "$RUN"

# The ranks meet on the job's first node. Each task reads its rank from srun's variables.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${nodes%%$'\n'*}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

command=(sctd pretrain)
if [ -n "${BRANCH_FROM:-}" ]; then command+=(--branch-from "$BRANCH_FROM"); else command+=("$RECIPE"); fi
command+=("run.dir=$RUN")
[ -n "${CORPUS:-}" ] && command+=("data.corpus=$CORPUS")
[ -n "${DEEPSPEED_CONFIG:-}" ] && command+=(--deepspeed_config "$DEEPSPEED_CONFIG")
# Where this job, or an earlier one, has saved there; else it starts with what this script says.
compgen -G "$RUN/checkpoints/step-*" >/dev/null || [ -e "$RUN/checkpoints/latest" ] || [ -e "$RUN/export" ] && command+=(--resume)

# One task checks the input before all nodes start: a second attempt would not help.
# shellcheck disable=SC2086 # ARGS and SRUN_ARGS are lists of words
WORLD_SIZE=$SLURM_NTASKS srun --nodes=1 --ntasks=1 ${SRUN_ARGS:-} "${command[@]}" ${ARGS:-} --print-config >/dev/null
[ $? -eq 2 ] && exit 2

newest() { cat "$RUN/checkpoints/latest" 2>/dev/null; }
before=$(newest)
echo "$(date -Is) job $SLURM_JOB_ID, attempt $((${SLURM_RESTART_COUNT:-0} + 1)), nodes ${nodes//$'\n'/ }: ${command[*]} ${ARGS:-}"
# With a container (pyxis and enroot): SRUN_ARGS="--container-image=IMAGE --container-mounts=$PWD --container-workdir=$PWD"
# shellcheck disable=SC2086
srun --kill-on-bad-exit=1 ${SRUN_ARGS:-} "${command[@]}" ${ARGS:-}
code=$?
echo "$(date -Is) srun ended with exit code $code; newest checkpoint: $(newest)"

# 0: done. 2: bad input, a second attempt would not help. 130: a person sent SIGINT before the first step, or twice.
# 75: stopped and saved; requeue, unless a file STOP asked for it. Else: a failure of the machine (74) or of the program.
case $code in
  2 | 130) exit "$code" ;;
  0 | 75)
    rm -f "$RUN/failures"
    [ "$code" -eq 0 ] && exit 0
    [ -e "$RUN/stopped" ] && exit 0
    ;;
  *)
    failures=1
    [ "$(newest)" = "$before" ] && failures=$(($(cat "$RUN/failures" 2>/dev/null || echo 0) + 1))
    echo "$failures" >"$RUN/failures"
    if [ "$failures" -ge "${MAX_FAILURES:-3}" ]; then
      echo "$failures failures in a row without a new checkpoint: giving up. See the errors above."
      exit "$code"
    fi
    ;;
esac
scontrol requeue "$SLURM_JOB_ID"
