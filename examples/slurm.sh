#!/usr/bin/env bash
# LocalVim-T on ImageNet on 2 nodes of 8 GPUs: sbatch examples/slurm.sh FOLDER_OF_IMAGENET
#SBATCH --job-name=localmamba
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGUSR1 to every task 5 minutes before the end: the state is saved, the exit code is 138.
#SBATCH --signal=USR1@300

# One task a GPU. A task that fails ends the others. The first run finds nothing to resume and starts.
srun --kill-on-bad-exit=1 localmamba train --data "$1" --model localvim_tiny \
    --config imagenet-localvim --output "runs/$SLURM_JOB_ID" --resume
code=$?

# 138: SIGUSR1. 143: SIGTERM, when a job of higher priority takes the nodes.
if [ "$code" = 138 ] || [ "$code" = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
