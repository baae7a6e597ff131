# Sourced by the scripts that chain stages.
# words_of SFT RM ...   makes the arrays SFT_WORDS, RM_WORDS ... of the variables SFT_ARGS, RM_ARGS ..., quoted as in a shell
# run COMMAND ...       shows a command and runs it; a stage that is finished returns at once, an unfinished one goes on
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
        [[ "$word" =~ ^[A-Za-z0-9_./:=,+-]+$ ]] || word="'$word'"
        shown+=" $word"
    done
    echo "$shown"
    "$@"
}

# Without an active environment, that of the checkout.
command -v rlhf > /dev/null || PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
