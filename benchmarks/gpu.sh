#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of a few minutes: its tests, the tables, a comparison of the arms.
#
#     bash benchmarks/gpu.sh OUT [CORPUS]
#
# OUT gets a log and the result files. With CORPUS, a folder made by `sctd prepare` (rows of 128 tokens), the backends
# are trained against each other too. Each part runs whatever became of the one before it.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:?usage: gpu.sh OUT [CORPUS]}
corpus=${2:-}
mkdir -p "$out"
export PYTHONPATH="pipeline:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

part() {
  echo "== $1"
  shift
  "$@" 2>&1
  echo "== exit $?"
}

{
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  part "tests" timeout 240 python3 -m pytest -q -p no:cacheprovider tests/gpu
  part "kernels" timeout 120 python3 -m sctd bench --kernels --sizes 32x512 --out "$out"
  part "base" timeout 180 python3 -m sctd bench bert-base-sctd model.attention_dropout=0 --sizes 64x512,256x128 --rounds 5 --out "$out"
  part "large" timeout 180 python3 -m sctd bench bert-large-sctd model.attention_dropout=0 --sizes 32x512 --rounds 5 --out "$out"
  part "modern" timeout 180 python3 -m sctd bench modernbert-base-sctd --sizes 64x512 --rounds 5 --out "$out"
  part "modern kernels" timeout 120 python3 -m sctd bench modernbert-base-sctd --kernels --sizes 32x512 --out "$out/modern"
  if [ -n "$corpus" ]; then
    part "backends" timeout 120 python3 benchmarks/backends.py --corpus "$corpus" --work "$out/work" --steps 100
    rm -rf "$out/work"
  fi
} | tee "$out/gpu.log"
