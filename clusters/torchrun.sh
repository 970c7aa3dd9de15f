#!/usr/bin/env bash
# Start this on each host, in the same checkout, with the same words. The hosts meet at HEAD, which is one of them, and train as one run.
#
#   HEAD=10.0.0.1 HOSTS=2 clusters/torchrun.sh launch/train.py --config configs/gpt-1b.yaml
#
# HEAD      address of the host where all meet, as the others reach it      PORT      of the meeting (29400)
# HOSTS     how many (a range such as 1:2 goes on with fewer)               RANKS     processes a host: gpu (one for each), or a number
# RUN_ID    the same word on all, another for each job (tally)              RESTARTS  how often all ranks are started anew (0)
set -euo pipefail
cd "$(dirname "$0")/.."

: "${HEAD:?the address of the host where all meet}"
head=$(getent ahostsv4 "$HEAD" | awk 'NR == 1 { print $1 }') || true # told in the next line
here=$(ip -4 -oneline route get "${head:?HEAD=$HEAD is no address and no name that is known here}" | sed -n 's/.* src \([0-9.]*\).*/\1/p')

echo "waiting at $head:${PORT:-29400} for ${HOSTS:?how many hosts} hosts, of which torchrun says nothing" >&2
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 # seconds that a last checkpoint may take; torch 2.11 does not know it and waits 30
# is_host and --local-addr: torchrun would look up this host's own name, which on many systems is 127.0.1.1, and nobody would be found
exec torchrun --nnodes "${HOSTS:?how many hosts}" --nproc-per-node "${RANKS:-gpu}" --max-restarts "${RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29400}" --rdzv-id "${RUN_ID:-tally}" \
    --rdzv-conf "is_host=$([ "$here" = "$head" ] && echo 1 || echo 0)" --local-addr "$here" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$@"
