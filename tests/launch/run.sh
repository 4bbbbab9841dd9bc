#!/usr/bin/env bash
# Run the launchers for real: ranks that are killed, two hosts made of network namespaces of which
# one is lost, a SLURM with two nodes on this machine, and the steps of the Dockerfile. About 8
# minutes; fetches packages.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ "$(id -u)" -ne 0 ]; then
    echo "error: make test-launch must be run as root: it makes network namespaces, starts SLURM" \
        "and installs iproute2, slurm-wlm and munge" >&2
    exit 2
fi
needed=(ip:iproute2 munged:munge slurmctld:slurm-wlm slurmd:slurm-wlm)
missing=()
for pair in "${needed[@]}"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
OMP_NUM_THREADS=1 exec timeout --kill-after=60 3000 \
    "${PYTHON:-.venv/bin/python}" -m pytest -v "$@" tests/launch/nodes.py tests/launch/image.py \
    tests/launch/slurm.py
