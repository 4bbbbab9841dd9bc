#!/usr/bin/env bash
# Print the path of a Python interpreter that runs, or exit 1 where there is none.
#
#   tools/find_python.sh          3.12, or else 3.13
#   tools/find_python.sh 3.13     this version alone
#
# A name on the PATH proves nothing: pyenv's shim for `python3.12` fails unless a 3.12 is activated,
# so an interpreter counts only when it answers. Looked at in this order, for 3.12 say:
#   1. $PYTHON, where the user set it    2. `python3.12`, then `python3`, on the PATH
#   3. the newest 3.12.x below `$(pyenv root)/versions`, else below ~/.pyenv/versions
# A version asked for by name passes over a $PYTHON of another one.
set -euo pipefail

named=$#
[ "$named" -gt 0 ] || set -- 3.12 3.13

# answers COMMAND VERSION: prints the real path of COMMAND's interpreter when it is that CPython.
answers() {
    "$1" -c 'import sys
if "%d.%d" % sys.version_info[:2] != sys.argv[1] or sys.implementation.name != "cpython":
    sys.exit(1)
print(sys.executable)' "$2" 2>/dev/null </dev/null
}

if [ -n "${PYTHON:-}" ]; then
    for version in "$@"; do
        answers "$PYTHON" "$version" && exit 0
    done
    if [ "$named" = 0 ]; then
        echo "error: PYTHON=$PYTHON is not a Python 3.12 or 3.13 that runs" >&2
        exit 1
    fi
fi

roots=()
if root=$(pyenv root 2>/dev/null </dev/null) && [ -n "$root" ]; then
    roots+=("$root")
fi
roots+=("${HOME:-/nonexistent}/.pyenv")

for version in "$@"; do
    for name in "python$version" python3; do
        answers "$name" "$version" && exit 0
    done
    for root in "${roots[@]}"; do
        # shellcheck disable=SC2010 # only names that are versions pass the filter
        while IFS= read -r full; do
            answers "$root/versions/$full/bin/python$version" "$version" && exit 0
        done < <(ls "$root/versions" 2>/dev/null | grep -E "^${version/./\\.}\.[0-9]+$" |
            sort -t. -k3,3nr)
    done
done
exit 1
