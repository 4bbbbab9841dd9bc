#!/usr/bin/env bash
# Make an environment hold exactly what requirements/dev.txt names, and the package itself (editable).
#
#   tools/bootstrap.sh          create or update .venv: Python 3.12, or 3.13 where only that is found
#   tools/bootstrap.sh 3.13     create or update .venv-3.13
#   tools/bootstrap.sh lock     write requirements/*.txt anew from requirements/*.in
#
# Needs bash, a package index and Python; uv is fetched with pip into .uv where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
exec </dev/null

fail() {
    echo "error: $1" >&2
    exit 1
}

case "${1:-}" in
    "" | lock) venv=.venv accepted=(3.12 3.13) python=$(tools/find_python.sh) || python="" ;;
    3.12 | 3.13) venv=.venv-$1 accepted=("$1") python=$(tools/find_python.sh "$1") || python="" ;;
    *) fail "Python $1 is not supported; 3.12 and 3.13 are" ;;
esac
if [ -n "${PYTHON:-}" ] && [ -z "$python" ] && [ "${#accepted[@]}" -gt 1 ]; then
    exit 1
fi

# A Python of any version that has pip: it knows the index, and it can fetch uv.
with_pip=""
for candidate in "$python" python3 python /usr/bin/python3; do
    if [ -n "$candidate" ] && "$candidate" -m pip --version >/dev/null 2>&1 &&
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
        with_pip=$candidate
        break
    fi
done
if [ -z "$with_pip" ] && [ -n "$python" ] && "$python" -m venv .uv/pip >/dev/null 2>&1; then
    with_pip=.uv/pip/bin/python
fi
if [ -n "$with_pip" ]; then
    eval "$("$with_pip" tools/uv_env.py)"
fi

if uv --version >/dev/null 2>&1; then
    uv() { command uv "$@"; }
else
    uv() { .uv/packages/bin/uv "$@"; }
    if ! uv --version >/dev/null 2>&1; then
        [ -n "$with_pip" ] ||
            fail "uv is missing and no python3 with pip was found to fetch it; install either one"
        echo "fetching uv into .uv"
        "$with_pip" -m pip install --quiet --disable-pip-version-check --upgrade --root-user-action ignore \
            --target .uv/packages --only-binary :all: --require-hashes -r requirements/uv.txt ||
            fail "pip could not fetch uv; is a package index within reach?"
    fi
fi

if [ "${1:-}" = lock ]; then
    compile() { # NAME VERSION FILE OPTION...
        uv pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --no-emit-find-links \
            --no-header --python-version "$2" --python "${python:-3.12}" \
            "requirements/$1.in" -o "$3" "${@:4}" >/dev/null
    }
    # One file for every supported Python: what 3.12 takes has to be what 3.13 takes.
    lock() {
        compile "$1" 3.12 "requirements/$1.txt" "${@:2}"
        compile "$1" 3.13 .uv/lock-3.13.txt "${@:2}"
        # Comments apart: they say who asked.
        cmp -s <(grep -v '^ *#' "requirements/$1.txt") <(grep -v '^ *#' .uv/lock-3.13.txt) ||
            fail "Python 3.13 needs other packages than 3.12: see .uv/lock-3.13.txt, and pin what differs in requirements/$1.in"
    }
    mkdir -p .uv
    lock dev
    lock uv
    # The same versions as tested, less what the image has in builds of its own.
    lock docker --constraints requirements/dev.txt --excludes requirements/docker.exclude.in
    exit 0
fi

version=${accepted[0]}
is_accepted='import sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])'
if ! "$venv/bin/python" -c "$is_accepted" "${accepted[@]}" 2>/dev/null; then
    rm -rf "$venv"
    if [ -z "$python" ]; then
        echo "no Python $version on this machine: uv downloads its own"
    fi
    uv venv -qq --python "${python:-$version}" "$venv" ||
        fail "no Python $version was found and uv could not download one; set PYTHON=/path/to/python$version"
fi

echo "installing the locked packages into $venv (several GB the first time)"
# Bytecode now: a process that may not write it would compile torch anew at each start (20 s).
uv pip sync --python "$venv/bin/python" --compile-bytecode --require-hashes requirements/dev.txt
# setuptools is in the lock: no build environment, so nothing outside the lock is fetched.
uv pip install --quiet --python "$venv/bin/python" --offline --no-deps --no-build-isolation -e .
