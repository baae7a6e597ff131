#!/usr/bin/env bash
# The shape of the HH-RLHF chain on CPU or any GPU, with any file of HH pairs: sft, reward model (LoRA), merge, RAFT, PPO.
# Start it again and it goes on where it was, or finds that nothing is left to do.
#
#   DATA=pairs.jsonl scripts/hh_small.sh
#   DATA=pairs.jsonl MODEL=runs/shakespeare/sft RANKS=8 ALIGN=raft scripts/hh_small.sh
#   DATA=pairs.jsonl SFT_ARGS="train.max_steps=20" RAFT_ARGS="raft.num_iterations=2" scripts/hh_small.sh train.seed=1
#
# Arguments are overrides of every training stage; SFT_ARGS, RM_ARGS, RAFT_ARGS and PPO_ARGS hold those of one.
set -euo pipefail
DATA="${DATA:?a file of HH pairs, such as DATA=pairs.jsonl}"
MODEL="${MODEL:-}"                            # empty: a Llama of 7 million parameters from scratch
RANKS="${RANKS:-2}"                           # 1, 2, 4 or 8
RUNS="${RUNS:-runs/hh_small}"
ALIGN="${ALIGN:-raft ppo}"                    # raft, ppo, or both
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
words_of SFT RM RAFT PPO
# 16 rows over the ranks divide every batch of these recipes.
common=(deepspeed=zero3 launch.num_processes="$RANKS" train.micro_batch_size=$((16 / RANKS)))
base=(model.path="$MODEL")
[[ -n "$MODEL" ]] || base=(model=small_llama)

run rlhf sft conf=hh_chosen "${base[@]}" data.path="$DATA" run_dir="$RUNS/sft" "${common[@]}" "${SFT_WORDS[@]}" "$@"
run rlhf rm conf=hh_pairs lora=r16 optim.lr=1e-3 model.path="$RUNS/sft" data.path="$DATA" run_dir="$RUNS/rm" \
    "${common[@]}" "${RM_WORDS[@]}" "$@"
run rlhf merge-lora merge.adapter="$RUNS/rm" run_dir="$RUNS/rm_merged"
if [[ " $ALIGN " == *" raft "* ]]; then
    run rlhf raft conf=hh_pairs model.path="$RUNS/sft" data.path="$DATA" \
        "reward.sources=[{path: '$RUNS/rm_merged'}]" run_dir="$RUNS/raft" "${common[@]}" "${RAFT_WORDS[@]}" "$@"
fi
if [[ " $ALIGN " == *" ppo "* ]]; then
    run rlhf ppo conf=hh_pairs model.path="$RUNS/sft" data.path="$DATA" \
        "reward.sources=[{path: '$RUNS/rm_merged'}]" run_dir="$RUNS/ppo" "${common[@]}" "${PPO_WORDS[@]}" "$@"
fi
