#!/bin/bash
# RUN=runs/big sbatch docs/slurm.sh trainer=fsdp llm=llama3_8b data=…
# One run on several nodes. Before the time limit, or when it is preempted, it saves, queues again and goes on.
#SBATCH --job-name=vlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

: "${RUN:?give the run directory, which all ranks share: RUN=runs/big sbatch docs/slurm.sh …}"

if [ -e "$RUN/config.yaml" ]; then
    set -- "resume=$RUN"
else
    set -- "$@" "run_dir=$RUN" "trainer.num_nodes=$SLURM_NNODES" "trainer.devices=$SLURM_NTASKS_PER_NODE"
fi

srun python train.py "$@" &
job=$!
trap 'kill -TERM "$job"' USR1 TERM # srun hands it to all ranks, and each ends after the step in progress
wait "$job"
code=$?
while kill -0 "$job" 2>/dev/null; do # a signal ends the first wait
    wait "$job"
    code=$?
done

[ "$code" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID" # 128 + SIGTERM: saved, and not done
exit "$code"
