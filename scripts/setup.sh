# Sourced by quickstart.sh and test.sh: a virtual environment with the package in it. The second time it does nothing.
# setup EXTRA...   installs the package from this checkout with the named extras.
setup() {
    local root extras stamp want python options
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    extras="$(IFS=,; echo "$*")"
    if [[ -z "${VIRTUAL_ENV:-}" ]]; then
        python="$(command -v python3 || true)"
        [[ -n "$python" ]] || { echo "error: python3 (3.10 or newer) is needed and not on the PATH" >&2; return 2; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "error: Python 3.10 or newer is needed, $python is $("$python" -V)" >&2; return 2; }
        # activate is what venv writes last: without it an earlier start was interrupted, and --clear begins anew.
        if [[ ! -x "$root/.venv/bin/python" || ! -f "$root/.venv/bin/activate" ]]; then
            echo "making $root/.venv"
            options=(--clear)
            # A torch that is installed already (a GPU image, say) is used instead of a second one.
            if "$python" -c 'import torch' 2>/dev/null; then options+=(--system-site-packages); fi
            "$python" -m venv "${options[@]}" "$root/.venv" || return 1
        fi
        # shellcheck disable=SC1091
        source "$root/.venv/bin/activate"
    fi
    stamp="$VIRTUAL_ENV/.rlhf-installed"
    want="$(cat "$root/pyproject.toml" <(echo "$root") | sha256sum | cut -d' ' -f1)"
    for extra in base "$@"; do
        if ! grep -qsx "$want $extra" "$stamp"; then
            echo "installing rlhf-cli${extras:+[$extras]} into $VIRTUAL_ENV"
            python -m pip install --quiet --disable-pip-version-check -e "$root${extras:+[$extras]}" || return 1
            { echo "$want base"; for e in "$@"; do echo "$want $e"; done; } > "$stamp"
            break
        fi
    done
}
