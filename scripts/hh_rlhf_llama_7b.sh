#!/usr/bin/env bash
# LMFlow's HH-RLHF chain for LLaMA-7B on 8 GPUs of 40 GB: sft, reward model (LoRA), merge, RAFT, PPO (LoRA), merge.
# Start it again and it goes on where it was, or finds that nothing is left to do.
#
#   MODEL=/models/llama-7b scripts/hh_rlhf_llama_7b.sh
#   MODEL=/models/llama-7b ALIGN=raft scripts/hh_rlhf_llama_7b.sh train.seed=1 logging.wandb=true
#   MODEL=/models/llama-7b sbatch --nodes=1 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 --signal=TERM@300 \
#       --wrap "scripts/hh_rlhf_llama_7b.sh launch=slurm"
#
# A job that meets its time limit saves and ends with 143; submit it again, or see docs/multi-gpu.md for one that does so itself.
#
# Arguments are overrides of every training stage; SFT_ARGS, RM_ARGS, RAFT_ARGS and PPO_ARGS hold those of one.
set -euo pipefail
MODEL="${MODEL:-/models/llama-7b}"            # a directory in Hugging Face layout, or a hub id
SFT_DATA="${SFT_DATA:-data/hh_rlhf/sft}"      # dialogues
RM_DATA="${RM_DATA:-data/hh_rlhf/rm}"         # pairs; raft and ppo answer their prompts
RUNS="${RUNS:-runs/hh_rlhf_llama_7b}"
ALIGN="${ALIGN:-raft ppo}"                    # raft, ppo, or both
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
words_of SFT RM RAFT PPO

run rlhf sft conf=hh_rlhf_llama_7b model.path="$MODEL" data.path="$SFT_DATA" run_dir="$RUNS/sft" "${SFT_WORDS[@]}" "$@"
run rlhf rm conf=hh_rlhf_llama_7b model.path="$RUNS/sft" data.path="$RM_DATA" run_dir="$RUNS/rm" "${RM_WORDS[@]}" "$@"
if [[ " $ALIGN " == *" raft "* ]]; then
    run rlhf merge-lora merge.adapter="$RUNS/rm" run_dir="$RUNS/rm_merged"
    run rlhf raft conf=hh_rlhf_llama_7b model.path="$RUNS/sft" data.path="$RM_DATA" \
        "reward.sources=[{path: '$RUNS/rm_merged'}]" run_dir="$RUNS/raft" "${RAFT_WORDS[@]}" "$@"
fi
if [[ " $ALIGN " == *" ppo "* ]]; then
    # The unmerged reward model shares its base with policy and critic (ppo.sharing=hydra).
    run rlhf ppo conf=hh_rlhf_llama_7b model.path="$RUNS/sft" data.path="$RM_DATA" \
        "reward.sources=[{path: '$RUNS/rm'}]" run_dir="$RUNS/ppo" "${PPO_WORDS[@]}" "$@"
    run rlhf merge-lora merge.adapter="$RUNS/ppo" run_dir="$RUNS/ppo_merged"
fi
