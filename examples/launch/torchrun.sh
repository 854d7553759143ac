#!/bin/bash
# Train on several machines, and start again from the last checkpoint after a worker or a machine has failed.
# Run the same line on each machine; HEAD is the name of any one of them, with a free port:
#     HEAD=node1:29400 MACHINES=2 bash examples/launch/torchrun.sh run.yaml --output_dir /shared/run
# output_dir must be a folder that all machines share.
set -euo pipefail
: "${HEAD:?set HEAD to a machine and a free port, such as node1:29400}"
# otherwise a process that starts again may read from torchrun's store where the processes before it could be reached
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "${MACHINES:-2}" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-fastdpo}" \
    -m fastdpo train "$@" --resume_from_checkpoint auto
