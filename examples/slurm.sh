#!/bin/bash
# Training under Slurm that outlives its time limit: a process for each GPU, and the job goes back into the queue when Slurm
# stops it. Set what is asked for below, then
#
#     sbatch examples/slurm.sh pretrain mae --data photos --out run --model vit_large_patch16_224 --shard
#
#SBATCH --job-name=leanmim
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1} # they share a machine's cores and shared memory

# No torchrun: each task is a process of leanmim, and gets the signals itself.
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec leanmim "$@"' leanmim "$@"
code=$?

# 128 + the signal's number says that a checkpoint was written: SIGUSR1 five minutes before the end of the time (--signal),
# SIGTERM where the job has to make room. The same command continues from it.
if [ $code -eq $((128 + $(kill -l USR1))) ] || [ $code -eq $((128 + $(kill -l TERM))) ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
