#!/usr/bin/env bash
# Train a YAML file of flags with torchrun. One node, or the same line on each of several nodes:
#
#   examples/launch/torchrun.sh CONFIG.yaml [flags]
#   NODES=4 HEAD=node1 examples/launch/torchrun.sh CONFIG.yaml [flags]
#
# Started again, it resumes from the last checkpoint in RUN_DIR. SIGUSR1 to its ranks, or
# to the whole process group, writes a checkpoint after the current step and ends the run on all nodes.
set -euo pipefail

# --- All there is to edit; a variable of the same name in the environment wins --------------------
NODES=${NODES:-1}                                           # all of them must be there to train
HEAD=${HEAD:-}                                              # name of one node; only if NODES > 1
PORT=${PORT:-29400}                                         # free on HEAD; only if NODES > 1
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}} # one per GPU
RUN_DIR=${RUN_DIR:-}                                        # seen by all nodes; empty: runs/NAME of the config
RUN_ID=${RUN_ID:-default-moe}                               # the same on all nodes
MAX_RESTARTS=${MAX_RESTARTS:-3}                             # after a rank failed
WAIT_SECONDS=${WAIT_SECONDS:-1800}                          # for a lost node to come back
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS-1} # what Megatron asks for
# --------------------------------------------------------------------------------------------------

fail() {
    echo "error: $1" >&2
    exit 2
}
usage() { # the head of this file, and what can be set
    sed -n '2,/^set -/{/^set -/d; s/^# \{0,1\}//; p}' "$0"
    echo "Variables of the environment that it reads, with their defaults:"
    sed -n 's/^\([A-Z_]*\)=\${[A-Z_]*:-\(.*\)} *# \(.*\)/  \1=\2  (\3)/p' "$0"
    printf '\nThe flags are those of default-moe pretrain --help.\n'
}
case ${1:-} in -h | --help)
    usage
    exit 0
    ;;
esac
[ $# -ge 1 ] || fail "no CONFIG.yaml: examples/launch/torchrun.sh CONFIG.yaml [flags]"
[ -f "$1" ] && [ -r "$1" ] || fail "$1 cannot be read: the first argument is a YAML file of flags"
[[ $NODES =~ ^[1-9][0-9]*$ ]] || fail "NODES is '$NODES': set it to the number of nodes"
command -v torchrun >/dev/null || fail "no torchrun: activate the environment, or use the image"
config=$1
shift
[ -n "$RUN_DIR" ] || RUN_DIR=runs/$(basename "$config" .yaml)

if [ "$NODES" -eq 1 ]; then
    rendezvous=(--standalone) # finds a free port itself
else
    [ -n "$HEAD" ] || fail "NODES is $NODES but HEAD is empty: set it to the name of one of them"
    rendezvous=(
        --nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$RUN_ID"
        --rdzv-conf "join_timeout=$WAIT_SECONDS"
    )
fi
command=(
    torchrun "${rendezvous[@]}" --nproc-per-node "$PROCESSES_PER_NODE" --max-restarts "$MAX_RESTARTS"
    -m megatron_default_moe.pretrain --config "$config"
    --save "$RUN_DIR/checkpoint" --load "$RUN_DIR/checkpoint"
    --tensorboard-dir "$RUN_DIR/tensorboard" --exit-signal-handler --exit-signal SIGUSR1 "$@"
)
printf '> '
printf '%q ' "${command[@]}"
printf '\n'
# A store shared between torchrun and the ranks still holds the addresses of dead ranks after a
# restart (pytorch issue 135712), and a node that joins in place of a lost one is not told the
# address of rank 0 (seen with torch 2.13): restarts hang or fail.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A signal to the whole process tree must not end torchrun: what a shell ignores stays ignored in
# what it becomes, until Megatron puts its own handler into each rank.
trap '' USR1
exec "${command[@]}"
