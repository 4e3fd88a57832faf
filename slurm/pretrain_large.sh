#!/usr/bin/env bash
# BERT-large with SCTD on four nodes of eight A100s:   CORPUS=/data/wiki-books-512 sbatch slurm/pretrain_large.sh
# Submit from the project's folder. Options on sbatch's command line win over the lines below; variables: slurm/job.sh.
#SBATCH --job-name=bert-large-sctd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# Ten minutes before the time limit each rank gets SIGUSR1: the run saves, and the job goes back into the queue.
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x.log

RECIPE=${RECIPE:-bert-large-sctd}
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG-ds_configs/zero1_bf16.json}
# shellcheck source=slurm/job.sh
. slurm/job.sh
