#!/usr/bin/env bash
# Prepare a corpus on two nodes, one rank per core:
#   SOURCES="wiki=/data/wiki/*.jsonl.xz books=/data/books/*.parquet" OUT=/data/corpus sbatch slurm/prepare_corpus.sh
# Submit from the project's folder. Options on sbatch's command line win over the lines below. Submit it again with the
# same variables to continue. Hub data sets need HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0.
#
#   SOURCES  sources, separated by spaces or lines    OUT   folder of the corpus, on a disk that all nodes share
#   TOKENIZER  default: a new one is trained          ARGS  further options, as for `sctd prepare`
#   SRUN_ARGS  for srun, such as a container
#SBATCH --job-name=prepare-corpus
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=32
#SBATCH --cpus-per-task=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x.log
set -uo pipefail
# shellcheck source=slurm/env.sh
. slurm/env.sh

if [ -z "${SOURCES:-}" ] || [ -z "${OUT:-}" ]; then
  echo "slurm/prepare_corpus.sh: SOURCES or OUT is not set: see the first lines of the script" >&2
  exit 2
fi
# One thread per rank: there are as many ranks as cores.
export OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it from sbatch

read -r -d '' -a sources <<<"$SOURCES" # split into words, without expanding globs
command=(sctd prepare --out "$OUT")
for source in "${sources[@]}"; do command+=(--source "$source"); done
[ -n "${TOKENIZER:-}" ] && command+=(--tokenizer "$TOKENIZER")

echo "$(date -Is) job $SLURM_JOB_ID, attempt $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NTASKS ranks: ${command[*]} ${ARGS:-}"
# shellcheck disable=SC2086 # ARGS and SRUN_ARGS are lists of words
srun --mpi=pmix --kill-on-bad-exit=1 ${SRUN_ARGS:-} "${command[@]}" ${ARGS:-}
code=$?
echo "$(date -Is) srun ended with exit code $code"
exit "$code" # 0: done. 2: bad input or a full disk. 74: a rank failed. Else: a rank was killed, or the program failed.
