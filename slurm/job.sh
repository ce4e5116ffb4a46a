# What every job does before its command: the settings of the site, threads, and where its processes meet.
set -euo pipefail
unset MASTER_PORT   # of the shell that submitted: all its jobs would meet at one port, also two on the same node
source slurm/site.sh

# Threads of each process, for what is computed on CPUs. Resuming on a CPU is exact at an equal number only.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

# SIGUSR1 waits until ldm.fit listens: a process that is still importing would die of it.
hold=(env --block-signal=USR1)
"${hold[@]}" true 2>/dev/null || hold=(env)   # GNU coreutils before 8.31 cannot

# Run a command on all tasks; when one of them fails, all end. A task that could not find the first node would
# wait for it until the time limit.
on_all_tasks() {
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 "${hold[@]}" bash -c '
        if ! getent ahosts "$MASTER_ADDR" >/dev/null; then
            echo "error: $SLURMD_NODENAME cannot resolve MASTER_ADDR=$MASTER_ADDR, where the processes meet:" \
                "set it to an address in slurm/site.sh" >&2
            sleep 2   # what a task says just before srun ends all may be lost
            exit 2
        fi
        exec "$@"' task "$@"
}

# Train one stage; arguments are those of ldm.fit.
fit() {
    on_all_tasks "$PYTHON" -u -m ldm.fit "$@" \
        --trainer.num_nodes="$SLURM_JOB_NUM_NODES" --trainer.devices="$SLURM_NTASKS_PER_NODE"
}
