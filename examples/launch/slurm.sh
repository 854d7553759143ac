#!/bin/bash
# Train on several machines of a Slurm cluster; the job queues itself again at its time limit and after a preemption.
#     sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 examples/launch/slurm.sh run.yaml --output_dir /shared/run
# Slurm starts one process per GPU, so that its signals reach them. Each then finishes its step, all save a checkpoint
# together, and they exit with code 143.
#SBATCH --job-name=fastdpo
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))

# when one process has ended, the others have 120 seconds to end too
srun --kill-on-bad-exit=0 --wait=120 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m fastdpo train "$@" --resume_from_checkpoint auto' \
    fastdpo "$@"
code=$?
if [ $code -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
