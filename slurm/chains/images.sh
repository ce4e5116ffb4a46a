#!/bin/bash
# Stable Diffusion 1.x from scratch, from a folder of images to its figures:
#   gpus="--gpus-per-node=8 --ntasks-per-node=8"
#   pack_args="--images images" autoencoder_sbatch="--nodes=2 $gpus" clip_sbatch="--nodes=4 $gpus" \
#       encode_sbatch="--nodes=2 $gpus" diffusion_sbatch="--nodes=16 $gpus" evaluation_sbatch="$gpus" \
#       evaluation_args="--inception inception.pth" slurm/chains/images.sh --partition=gpu
source "$(dirname "${BASH_SOURCE[0]}")/../chain.sh"

stage pack "" slurm/run.sbatch -m data.folder --out shards/images
stage autoencoder pack slurm/fit.sbatch --config configs/autoencoder/kl-f8.yaml
stage clip pack slurm/fit.sbatch --config configs/clip/vit-b-32.yaml
stage encode autoencoder slurm/run.sbatch -m ldm.encode --autoencoder runs/images/autoencoder \
    --shards "shards/images/train-*.tar" --out shards/images-latents --num-workers 4
stage diffusion "encode clip" slurm/fit.sbatch --config configs/diffusion/sd1.yaml
stage evaluation "diffusion clip" slurm/run.sbatch -m ldm.evaluate --checkpoint runs/images/diffusion \
    --data "shards/images/val-*.tar" --clip runs/images/clip --out runs/images/evaluation
end_of_chain
