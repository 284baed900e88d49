#!/bin/bash
# Several machines under SLURM: one torchrun per machine, which starts one process per GPU.
#   RECIPE=recipes/cl_mae_vit_base_imagenet.yaml OUTPUT=outputs/cl_mae sbatch recipes/slurm.sh [more options of clmae pretrain]
# Submitted again, it goes on from the last checkpoint, also with another number of machines: keep the total batch, images
# per device x devices x accumulation, as it was.
#SBATCH --job-name=clmae
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Before the time is up: finish the step at the next log, and save. torchrun gives it 30 seconds.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${RECIPE:?give a recipe, such as recipes/cl_mae_vit_base_imagenet.yaml}" "${OUTPUT:?give a folder for the run}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${head%%$'\n'*}  # the first one's name
resume=false
if compgen -G "$OUTPUT/checkpoint-*" > /dev/null; then resume=last; fi

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head:29500" \
    -m clmae pretrain --config "$RECIPE" --output_dir "$OUTPUT" --resume_from_checkpoint "$resume" "$@"
