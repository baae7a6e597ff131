#!/usr/bin/env bash
# The Shakespeare exercise: a small model from scratch on the plays, a classifier of happy and sad passages, then PPO and RAFT
# towards happy lines. Start it again and it goes on where it was, or finds that nothing is left to do.
#
#   scripts/shakespeare.sh
#   SFT_CONF=shakespeare_56m scripts/shakespeare.sh train.seed=1
#   scripts/shakespeare.sh launch.num_processes=2 train.micro_batch_size=8
#   ALIGN=ppo PPO_ARGS="ppo.kl_coef=0.2 ppo.alarms.action=stop" scripts/shakespeare.sh
#
# Arguments are overrides of every stage; SFT_ARGS, RM_ARGS, RAFT_ARGS and PPO_ARGS hold those of one.
set -euo pipefail
PLAYS="${PLAYS:-data/shakespeare/tinyshakespeare.txt}"           # plain text
LABELS="${LABELS:-data/shakespeare/sentiment.jsonl}"             # labelled passages: happy, sad
SFT_CONF="${SFT_CONF:-shakespeare_bpe}"       # or shakespeare_word, shakespeare_56m
RUNS="${RUNS:-runs/shakespeare}"
ALIGN="${ALIGN:-ppo raft}"                    # ppo, raft, or both
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
words_of SFT RM RAFT PPO
happy="reward.sources=[{type: classifier, path: '$RUNS/mood', label: happy}]"

run rlhf sft conf="$SFT_CONF" data.path="$PLAYS" run_dir="$RUNS/sft" "${SFT_WORDS[@]}" "$@"
run rlhf rm conf=shakespeare_sentiment model.path="$RUNS/sft" data.path="$LABELS" run_dir="$RUNS/mood" \
    "${RM_WORDS[@]}" "$@"
if [[ " $ALIGN " == *" ppo "* ]]; then
    run rlhf ppo conf=shakespeare_happy model.path="$RUNS/sft" data.path="$PLAYS" "$happy" run_dir="$RUNS/ppo" \
        "${PPO_WORDS[@]}" "$@"
fi
if [[ " $ALIGN " == *" raft "* ]]; then
    run rlhf raft conf=shakespeare_happy model.path="$RUNS/sft" data.path="$PLAYS" "$happy" run_dir="$RUNS/raft" \
        "${RAFT_WORDS[@]}" "$@"
fi
