#!/usr/bin/env bash
# Print the path of a Python 3.12 interpreter that runs, or exit 1 where there is none.
#
# A name on the PATH proves nothing: pyenv's shim for `python3.12` fails unless a 3.12 is activated,
# so an interpreter counts only when it answers. Looked at in this order:
#   1. $PYTHON, where the user set it    2. `python3.12`, then `python3`, on the PATH
#   3. the newest 3.12.x below `$(pyenv root)/versions`, else below ~/.pyenv/versions
set -euo pipefail

# answers COMMAND: prints the real path of COMMAND's interpreter when it is a CPython 3.12.
answers() {
    "$1" -c 'import sys
if sys.version_info[:2] != (3, 12) or sys.implementation.name != "cpython":
    sys.exit(1)
print(sys.executable)' 2>/dev/null </dev/null
}

if [ -n "${PYTHON:-}" ]; then
    answers "$PYTHON" && exit 0
    echo "error: PYTHON=$PYTHON is not a Python 3.12 that runs" >&2
    exit 1
fi

for name in python3.12 python3; do
    answers "$name" && exit 0
done

roots=()
if root=$(pyenv root 2>/dev/null </dev/null) && [ -n "$root" ]; then
    roots+=("$root")
fi
roots+=("${HOME:-/nonexistent}/.pyenv")

for root in "${roots[@]}"; do
    # shellcheck disable=SC2010 # only names that are versions pass the filter
    while IFS= read -r version; do
        answers "$root/versions/$version/bin/python3.12" && exit 0
    done < <(ls "$root/versions" 2>/dev/null | grep -E '^3\.12\.[0-9]+$' | sort -t. -k3,3nr)
done
exit 1
