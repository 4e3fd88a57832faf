# shellcheck shell=bash
# Edit this once for your site: every job script here sources it on every node. Each value can also be set from
# outside: `SCTD_VENV=/opt/sctd sbatch slurm/pretrain_large.sh`.

# Software. Uncomment and adapt what your site needs.
# module purge
# module load cuda/12.8 gcc/13
SCTD_VENV=${SCTD_VENV:-.venv}
# shellcheck disable=SC1091
[ -f "$SCTD_VENV/bin/activate" ] && . "$SCTD_VENV/bin/activate"

# Compute nodes seldom have internet access: read everything from disk, and fail at once if a file is missing.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
export TRANSFORMERS_OFFLINE=${TRANSFORMERS_OFFLINE:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# NCCL: a lost node ends the job instead of blocking it; NCCL_DEBUG=INFO shows which network is used.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_SOCKET_IFNAME=ib0   # if the nodes have several networks
# export NCCL_IB_HCA=mlx5

# Cache compiled kernels on the node's own disk: home folders on a network are slow, and shared by all jobs.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/$(id -un)-triton}
export PYTHONUNBUFFERED=1
