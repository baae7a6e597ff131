#!/usr/bin/env bash
# From a bare clone to a small trained model: installs into .venv (or the active environment), then trains a tiny
# model from scratch on the embedded dialogues. Start it again and it goes on, or finds that nothing is left to do.
# Arguments are overrides: scripts/quickstart.sh train.epochs=4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup
RUNS="${RUNS:-runs/quickstart}"

run() { echo "\$ $*"; "$@"; }

run rlhf sft conf=quickstart run_dir="$RUNS/sft" "$@"

echo
echo "What it has learned: $RUNS/sft/samples, $RUNS/sft/plots/loss.png, tensorboard --logdir $RUNS"
echo "The model in $RUNS/sft/model loads with transformers.AutoModelForCausalLM."
