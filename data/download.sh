#!/usr/bin/env bash
# Downloads a data set by name, checks it, and lays it out as the stages read it. Needs Python 3.10 and nothing else.
#
#   data/download.sh --list
#   data/download.sh hh_rlhf
#   RLHF_MIRROR=https://mirror.example/rlhf data/download.sh all --to /data
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
for python in python3 "$here/../.venv/bin/python" python; do
    if command -v "$python" > /dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        exec "$python" "$here/download.py" "$@"
    fi
done
echo "error: Python 3.10 or newer is needed, and there is none on the PATH (python3) or in $(dirname "$here")/.venv" >&2
exit 2
