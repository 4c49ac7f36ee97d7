#!/usr/bin/env bash
# Train on all workers of a Cloud TPU pod.
#
#     export TPU=my-v5e-64 ZONE=us-west4-a
#     launch/tpu_pod.sh install                                  # this commit, on every worker
#     launch/tpu_pod.sh run --config=configs/alexnet.py --workdir=/shared/runs/alexnet
#     launch/tpu_pod.sh log                                      # follow the log of worker 0
#     launch/tpu_pod.sh stop                                     # save and stop; `run` resumes
#
# TPU          name of the TPU VM, with one host or several
# ZONE         its zone
# PROJECT      its project; gcloud's default if unset
# DRY_RUN=1    print the commands without running them
#
# The workdir must be on a file system that all workers have mounted (Filestore, or a bucket through
# gcsfuse). JAX detects the workers. The program continues when this connection ends.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 2
}

[[ $# -gt 0 ]] || usage
verb=$1
shift
: "${TPU:?the name of the TPU VM}" "${ZONE:?the zone of the TPU VM}"
where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

do_it() {
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

on() { # WORKER COMMAND
  do_it gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker="$1" --command="$2"
}

# Expanded on a worker: no program is running yet; the program has not ended at once, as after an error.
# shellcheck disable=SC2016
free='{ ! kill -0 "$(cat nat_jax.pid 2> /dev/null)" 2> /dev/null || { echo "it is running; stop it first"; exit 1; }; }'
# shellcheck disable=SC2016
alive='for _ in {1..20}; do sleep 1; kill -0 $! 2> /dev/null || { wait $!; code=$?; tail nat_jax.log; exit $code; }; done'

case $verb in
  install)
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=${TMPDIR:-/tmp}/nat_jax.tar.gz
    git -C "$here" diff --quiet HEAD || echo "tpu_pod.sh: uncommitted changes are not installed" >&2
    do_it git -C "$here" archive --format=tar.gz --prefix=nat_jax/ --output="$archive" HEAD
    do_it gcloud compute tpus tpu-vm scp "$archive" "$TPU:nat_jax.tar.gz" "${where[@]}" --worker=all
    on all 'tar xzf nat_jax.tar.gz && python3 -m venv nat_jax_env && nat_jax_env/bin/pip install -q ./nat_jax[tpu]'
    ;;
  run)
    [[ $# -gt 0 ]] || usage
    arguments=$(printf '%q ' "$@")
    on all "$free && { nohup nat_jax_env/bin/python -m nat_jax.main $arguments> nat_jax.log 2>&1 < /dev/null & echo \$! > nat_jax.pid; } && $alive"
    ;;
  log)
    on 0 'tail -n 100 -f nat_jax.log'
    ;;
  stop)
    # One worker is enough: JAX notifies the others, and all stop after the same step.
    on 0 "kill -TERM \$(cat nat_jax.pid)"
    ;;
  *)
    usage
    ;;
esac
