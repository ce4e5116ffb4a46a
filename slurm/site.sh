# What this cluster needs before Python starts; every job sources it. Edit this file, and only this one.

# module load cuda
# export PATH="$HOME/envs/ldm/bin:$PATH"
export PYTHON="${PYTHON:-.venv/bin/python}"

# Threads of each process, for what is computed on CPUs. Resuming on a CPU is exact at an equal number only.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# Where the processes meet. The name of the first node must resolve on the others; otherwise its address, or
# MASTER_ADDR given to sbatch.
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"

# Network between nodes: name the interface if the default one is not the fast one.
# export NCCL_SOCKET_IFNAME=ib0       # for meeting, and for everything where there is no InfiniBand
# export NCCL_IB_HCA=mlx5             # which InfiniBand adapters carry the gradients
# export NCCL_DEBUG=INFO              # says in the log which of them are used
