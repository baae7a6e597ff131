#!/usr/bin/env bash
# Install into .venv (or the active environment) and run every check: format, lint, types, tests.
# Arguments go to pytest: scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup test
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
mypy
exec python -m pytest -n "${RLHF_TEST_WORKERS:-2}" --dist loadgroup "$@"
