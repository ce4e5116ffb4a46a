# What this cluster needs. Edit this file, and only this one: every job sources it before its command, and the
# chains source it before they submit.

# module load cuda
# export PATH="$HOME/envs/ldm/bin:$PATH"
export PYTHON="${PYTHON:-.venv/bin/python}"

# Where the jobs of a chain go, unless its command line says otherwise; of a job alone, sbatch's does.
# export SBATCH_ACCOUNT=vision
# export SBATCH_PARTITION=gpu

# Where the processes meet is the first node, by its name. If that does not resolve on the others, its address:
# export MASTER_ADDR=10.1.0.17
# The port is 20000 and the job's last four digits; where a firewall leaves others open, one of those:
# export MASTER_PORT=$((50000 + ${SLURM_JOB_ID:-0} % 1000))

# The network between nodes. NCCL finds InfiniBand itself, and else takes the first interface that is up, which
# may be the slow one, or one that leads nowhere. The Watchdog names a node that is cut off.
# export NCCL_SOCKET_IFNAME=ib0       # interface for meeting, and for everything where there is no InfiniBand;
#                                     # ^lo,docker0 means any but these. GLOO_SOCKET_IFNAME is that of CPU jobs
# export NCCL_IB_HCA=mlx5             # InfiniBand adapters that carry the gradients; NCCL_IB_DISABLE=1 uses none
# export NCCL_NET_GDR_LEVEL=PHB       # how far a GPU may be from an adapter that reads its memory directly
# export NCCL_IB_TIMEOUT=22           # patience with a congested fabric: 4.1 us * 2^22 = 17 s for each of 7 tries
# export NCCL_DEBUG=INFO              # says in the log which of them are used, and why a connection failed
