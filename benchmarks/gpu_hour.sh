#!/usr/bin/env bash
# Tally on one GPU, in two runs of a few minutes: A is it right (gpu_checks.py), B how fast
# (gpu_speed.py). Every finding is at once a line of $OUT/results.jsonl. From the root of a checkout:
#
#   bash benchmarks/gpu_hour.sh A
#   MINUTES=6 OUT=findings bash benchmarks/gpu_hour.sh B
#   TINY=1 bash benchmarks/gpu_hour.sh A     the same in small on a CPU, to know that it runs
#
# On a machine without a network, name a folder with the wheels that it lacks in WHEELS.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
PY=${PY:-python3}
out=${OUT:-build/gpu_hour}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "${WHEELS:-}" ]; then
    "$PY" -m pip install -q --no-index --no-deps --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH=$PWD:$site:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
ends_at=$(($(date +%s) + ${MINUTES:-6} * 60))
if [ -n "${TINY:-}" ]; then tiny=--tiny slower=4; else tiny='' slower=1; fi # a CPU is slower

tell() { # a finding of this script's: CHECK WHAT
    printf '{"check": "%s", "what": "%s"}\n' "$1" "$2" | tee -a "$out/results.jsonl"
}

check() { # SECONDS SCRIPT words...: never longer than what is left of the run
    local limit=$(($1 * slower)) left=$((ends_at - $(date +%s))) code
    shift
    if [ "$left" -lt 5 ]; then
        tell "left out" "$*"
        return
    fi
    [ "$left" -lt "$limit" ] && limit=$left
    echo "== $* (at most $limit s)" | tee -a "$out/log.txt"
    timeout -k 5 "$limit" "$PY" "$here/$1.py" "${@:2}" $tiny --out "$out" 2>&1 |
        tee -a "$out/log.txt"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || tell "ended with code $code" "$*"
}

command -v nvidia-smi > /dev/null && nvidia-smi > "$out/nvidia-smi.txt" 2>&1
case ${1:-} in
A)
    check 40 gpu_checks environment
    if ! grep '"check": "environment"' "$out/results.jsonl" | grep -qv '"failed"'; then
        # Tally lets segments grow by itself, which some machines say they can and cannot
        export PYTORCH_ALLOC_CONF=expandable_segments:False
        check 40 gpu_checks environment
    fi
    check 60 gpu_checks attention
    check 45 gpu_checks shapes
    check 60 gpu_checks generate
    check 75 gpu_checks steps
    check 45 gpu_checks loss
    check 60 gpu_checks page_locked
    check 120 gpu_checks resume
    ;;
B)
    check 40 gpu_speed rates
    check 150 gpu_speed step --rows 16 --compiled --profile
    check 40 gpu_speed step --rows 16
    check 90 gpu_speed step --rows 32 --accumulation 2 --compiled --steps 3
    check 80 gpu_speed step --rows 16 --compiled --kernel flash --steps 3
    check 80 gpu_speed step --rows 16 --compiled --way "bf16 residual" --steps 3
    check 60 gpu_speed step --rows 16 --compiled --way "block by block" --steps 3
    check 40 gpu_speed memory --rows 16
    check 90 gpu_speed save
    ;;
*)
    echo "usage: bash benchmarks/gpu_hour.sh A|B" >&2
    exit 2
    ;;
esac
