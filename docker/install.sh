#!/usr/bin/env bash
# Add to the image what it lacks: docker/install.sh [FOLDER WITH WHEELS]
# Fails if a package that was there before has changed, or has lost something it requires.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=${1:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { python -m pip "$@" --no-cache-dir --no-deps --disable-pip-version-check; }

python docker/packages.py constraints >"$work/image.txt"
python docker/packages.py missing requirements/docker.txt >"$work/missing.txt"
# The image's own constraints are for its own packages; those below hold all of them.
export PIP_CONSTRAINT=
if [ -s "$work/missing.txt" ]; then
    pip install --require-hashes --only-binary :all: -r "$work/missing.txt"
fi
for wheel in "$wheels"/*.whl; do
    if [ -e "$wheel" ]; then
        pip install -c "$work/image.txt" "$wheel"
    fi
done
python docker/packages.py check "$work/image.txt"
