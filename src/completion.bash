# Completes keys, groups and options of `python -m src.train ...` and the other stages:  source src/completion.bash
# In zsh first:  autoload -U bashcompinit && bashcompinit
# Hydra computes the completions; its own installer supports `python file.py` only, not `python -m module`.
COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}

_src_stages() {
    [[ ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} == src.* ]] || return 0
    local line="${COMP_WORDS[0]} ${COMP_LINE#* -m }"
    # Hydra completes `+experiment=`, but the words after it only if it has no plus.
    line=$(sed "s/+experiment=\([^ ]*\) /experiment=\1 /" <<< "$line")
    read -ra COMPREPLY < <(COMP_LINE="$line" COMP_POINT=${#line} "${COMP_WORDS[0]}" -m "${COMP_WORDS[2]}" -sc query=bash 2> /dev/null)
}
complete -o nospace -o default -F _src_stages python
