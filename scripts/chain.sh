# Sourced by the scripts that chain stages.
# words_of SFT RM ...   makes the arrays SFT_WORDS, RM_WORDS ... of the variables SFT_ARGS, RM_ARGS ..., quoted as in a shell
# run COMMAND ...       shows a command and runs it; a stage that is finished returns at once, an unfinished one goes on

# Before 4.4, bash calls an array without words unset.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "error: bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
    exit 2
fi

words_of() {
    local stage variable
    for stage in "$@"; do
        variable="${stage}_ARGS"
        eval "${stage}_WORDS=(${!variable:-})"
    done
}

run() {
    local word shown='$'
    for word in "$@"; do
        case "$word" in
            *[\"\$\`\\]*) word="${word@Q}" ;;
            *\'*) word="\"$word\"" ;;
            "" | *[!A-Za-z0-9_./:=,+-]*) word="'$word'" ;;
        esac
        shown+=" $word"
    done
    echo "$shown"
    "$@"
}

# Without an active environment, that of the checkout.
command -v rlhf > /dev/null || PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
