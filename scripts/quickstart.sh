#!/usr/bin/env bash
# From a bare clone to an aligned policy: installs into .venv (or the active environment), trains a tiny model from scratch
# on the embedded dialogues, then a LoRA reward model on the embedded pairs, merges it, and runs PPO and RAFT with it. At the
# end a table says what each stage has changed, by the reward model and by the preference that made the data.
# Start it again and it goes on, or finds that nothing is left to do. docs/quickstart.md explains what one sees.
#
#   scripts/quickstart.sh
#   RUNS=runs/quickstart_1 scripts/quickstart.sh train.seed=1
#   RUNS=runs/careful PPO_ARGS="ppo.kl_coef=0.2" scripts/quickstart.sh
#
# Arguments are overrides of every training; SFT_ARGS, RM_ARGS, PPO_ARGS and RAFT_ARGS hold those of one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup
RUNS="${RUNS:-runs/quickstart}"
source scripts/chain.sh
words_of SFT RM PPO RAFT
judge="reward.sources=[{path: '$RUNS/rm_merged'}]"

run rlhf sft conf=quickstart run_dir="$RUNS/sft" "${SFT_WORDS[@]}" "$@"
run rlhf rm conf=quickstart model.path="$RUNS/sft" run_dir="$RUNS/rm" "${RM_WORDS[@]}" "$@"
run rlhf merge-lora merge.adapter="$RUNS/rm" run_dir="$RUNS/rm_merged"
run rlhf ppo conf=quickstart model.path="$RUNS/sft" "$judge" run_dir="$RUNS/ppo" "${PPO_WORDS[@]}" "$@"
run rlhf raft conf=quickstart model.path="$RUNS/sft" "$judge" run_dir="$RUNS/raft" "${RAFT_WORDS[@]}" "$@"
run rlhf score "$judge" data.path=data/quickstart/pairs.jsonl data.limit=200 run_dir="$RUNS/scores"
run rlhf report "$RUNS" out="$RUNS/report.html"

echo
run python scripts/quickstart_table.py "$RUNS"
echo
echo "To look at: $RUNS/report.html in a browser, $RUNS/*/samples, tensorboard --logdir $RUNS"
echo "To use: $RUNS/{sft,ppo,raft}/model load with transformers.AutoModelForCausalLM,"
echo "$RUNS/rm_merged/model with transformers.AutoModelForSequenceClassification."
