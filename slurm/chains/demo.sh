#!/bin/bash
# What `make demo` trains, as jobs:
#   slurm/chains/demo.sh --partition=cpu --cpus-per-task=4
source "$(dirname "${BASH_SOURCE[0]}")/../chain.sh"

stage pack "" slurm/run.sbatch -m data.shapes --out shards/shapes
stage autoencoder pack slurm/fit.sbatch --config configs/demo/autoencoder.yaml
stage clip pack slurm/fit.sbatch --config configs/demo/clip.yaml
stage encode autoencoder slurm/run.sbatch -m ldm.encode --autoencoder runs/demo/autoencoder \
    --shards "shards/shapes/train-*.tar" --out shards/shapes-latents
stage diffusion "encode clip" slurm/fit.sbatch --config configs/demo/diffusion.yaml
stage evaluation "diffusion clip" slurm/run.sbatch -m ldm.evaluate --checkpoint runs/demo/diffusion \
    --data "shards/shapes/novel-*.tar" --clip runs/demo/clip --out runs/demo/evaluation
end_of_chain
