#!/usr/bin/env bash
# The three steps of InstructGPT (arXiv 2203.02155): demonstrations, rankings of several answers, PPO with pretraining text.
# Start it again and it goes on where it was, or finds that nothing is left to do.
#
#   MODEL=EleutherAI/pythia-1.4b DEMOS=demos.jsonl RANKINGS=rankings.jsonl PROMPTS=prompts.jsonl TEXT=text.jsonl scripts/instructgpt.sh
#   ... sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 --signal=TERM@300 \
#       --wrap "scripts/instructgpt.sh launch=slurm"
#
# A job that meets its time limit saves and ends with 143; submit it again, or see docs/multi-gpu.md for one that does so itself.
#
# Arguments are overrides of every stage; SFT_ARGS, RM_ARGS and PPO_ARGS hold those of one.
set -euo pipefail
MODEL="${MODEL:?a model in Hugging Face layout, or a hub id}"
DEMOS="${DEMOS:?prompts with the answer of a person}"
RANKINGS="${RANKINGS:?prompts with 4 to 9 answers and their ranks}"
PROMPTS="${PROMPTS:?prompts}"
TEXT="${TEXT:?plain text like that of the pretraining}"
RUNS="${RUNS:-runs/instructgpt}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
words_of SFT RM PPO

# C.1: 16 epochs, far beyond the lowest loss, because the reward model's opinion still rises; lr of the 1.3B model.
run rlhf sft deepspeed=zero3 model.path="$MODEL" model.gradient_checkpointing=true data.path="$DEMOS" data.max_length=1024 \
    data.validation_split_percentage=5 optim.lr=9.65e-6 train.epochs=16 train.global_batch_size=32 \
    train.micro_batch_size=2 train.save_every=200 run_dir="$RUNS/sft" "${SFT_WORDS[@]}" "$@"
run rlhf rm conf=instructgpt_kwise model.path="$RUNS/sft" data.path="$RANKINGS" run_dir="$RUNS/rm" "${RM_WORDS[@]}" "$@"
run rlhf ppo conf=instructgpt_ptx model.path="$RUNS/sft" data.path="$PROMPTS" ppo.ptx.data.path="$TEXT" \
    "reward.sources=[{path: '$RUNS/rm'}]" run_dir="$RUNS/ppo" "${PPO_WORDS[@]}" "$@"
