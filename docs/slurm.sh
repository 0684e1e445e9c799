#!/bin/bash
# RUN=runs/big sbatch docs/slurm.sh trainer=fsdp llm=llama3_8b data=…
# One run on several nodes. Before the time limit, or when it is preempted, it saves, queues again and goes on.
#SBATCH --job-name=vlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

: "${RUN:?give the run directory, which all ranks share: RUN=runs/big sbatch docs/slurm.sh …}"

if [ -e "$RUN/config.yaml" ]; then
    set -- "resume=$RUN"
else
    set -- "$@" "run_dir=$RUN" "trainer.num_nodes=$SLURM_NNODES" "trainer.devices=$SLURM_NTASKS_PER_NODE"
fi

trap : TERM # which SLURM sends to every rank too: each ends after the step in progress
srun python train.py "$@"
code=$?

if [ "$code" -eq 143 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID" # 128 + SIGTERM: saved, and not done; a job that was cancelled is COMPLETING
fi
exit "$code"
