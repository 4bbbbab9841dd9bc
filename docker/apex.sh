#!/usr/bin/env bash
# Build a wheel of NVIDIA Apex from source: docker/apex.sh FOLDER
# Needs APEX (0 or 1), APEX_SOURCE, APEX_COMMIT, CUDA_ARCHS. No GPU is needed, the CUDA compiler is.
set -euo pipefail
wheels=$1
mkdir -p "$wheels"
if [ "$APEX" = 0 ]; then
    exit 0
fi
source=$(mktemp -d)
git -C "$source" init --quiet
git -C "$source" fetch --quiet --depth 1 "$APEX_SOURCE" "$APEX_COMMIT"
git -C "$source" checkout --quiet FETCH_HEAD
# Two of its extensions: fused weight gradients (--gradient-accumulation-fusion) and FusedAdam.
export APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST=$CUDA_ARCHS
python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$wheels" "$source"
rm -rf "$source"
