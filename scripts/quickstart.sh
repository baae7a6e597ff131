#!/usr/bin/env bash
# From a bare clone to an aligned policy: installs into .venv (or the active environment), trains a tiny model from
# scratch on the embedded dialogues, then a LoRA reward model on the embedded pairs, merges it, and runs PPO and RAFT with it.
# Start it again and it goes on, or finds that nothing is left to do. RUNS=... puts the runs elsewhere.
# Arguments are overrides of the first stage: scripts/quickstart.sh train.epochs=4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup
RUNS="${RUNS:-runs/quickstart}"

run() { echo "\$ $*"; "$@"; }

run rlhf sft conf=quickstart run_dir="$RUNS/sft" "$@"
run rlhf rm conf=quickstart model.path="$RUNS/sft" run_dir="$RUNS/rm"
run rlhf merge-lora merge.adapter="$RUNS/rm" run_dir="$RUNS/rm_merged"
run rlhf ppo conf=quickstart model.path="$RUNS/sft" "reward.sources=[{path: $RUNS/rm_merged}]" run_dir="$RUNS/ppo"
run rlhf raft conf=quickstart model.path="$RUNS/sft" "reward.sources=[{path: $RUNS/rm_merged}]" run_dir="$RUNS/raft"
run rlhf score "reward.sources=[{path: $RUNS/rm_merged}]" data.path=data/quickstart/pairs.jsonl data.limit=200 \
    run_dir="$RUNS/scores"

echo
echo "What it has learned: $RUNS/*/samples, $RUNS/*/plots, tensorboard --logdir $RUNS"
echo "$RUNS/{sft,ppo,raft}/model load with transformers.AutoModelForCausalLM,"
echo "$RUNS/rm_merged/model with transformers.AutoModelForSequenceClassification."
