#!/usr/bin/env bash
# Train in several processes on this host.
#
#     PROCESSES=2 launch/local.sh --config=configs/smoke.py
#
# PROCESSES    their number, 2 by default. One process drives all GPUs of a host; several are a test of a
#              cluster, or give one process per GPU: process i uses GPU i.
# CPU_DEVICES  run on the CPU instead, with this many simulated devices in each process
# PORT         the port of process 0, 8476 by default
# PYTHON       the interpreter, python by default
# DRY_RUN=1    print the commands without running them
#
# Ctrl-C and SIGTERM save and stop all processes; the same command resumes. The exit code is that of the
# first process in order that failed: 2 for an error of the user, 75 or 134 if a process was lost, 130 or
# 143 after Ctrl-C, 143 after SIGTERM.
set -euo pipefail

processes=${PROCESSES:-2}
port=${PORT:-8476}
python=${PYTHON:-python}

if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "local.sh: PROCESSES: expected an integer of at least 1; got '$processes'" >&2
  exit 2
fi
pids=()
interrupted=0
# shellcheck disable=SC2329 # the trap calls it
stop() {
  interrupted=1
  kill -TERM "${pids[@]}" 2>/dev/null || true # also after Ctrl-C, which background jobs ignore
}
trap stop INT TERM

for ((index = 0; index < processes; index++)); do
  if [[ -n ${CPU_DEVICES:-} ]]; then
    # XLA's thread pool may deadlock with fewer threads than devices.
    variables=(JAX_PLATFORMS=cpu NPROC=16
      "XLA_FLAGS=--xla_force_host_platform_device_count=$CPU_DEVICES")
  else
    variables=("JAX_LOCAL_DEVICE_IDS=$index")
  fi
  run=(env "${variables[@]}" "$python" -m nat_jax.main "$@" --coordinator="127.0.0.1:$port"
    --num_processes="$processes" --process_id="$index")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${run[@]}"
    printf '&\n'
  else
    "${run[@]}" &
    pids+=($!)
  fi
done

first=0
for pid in "${pids[@]+"${pids[@]}"}"; do
  while true; do
    interrupted=0
    wait "$pid" && code=0 || code=$?
    ((interrupted)) || break # else it was a signal to this script that ended the wait
  done
  ((first != 0)) || first=$code
done
exit "$first"
