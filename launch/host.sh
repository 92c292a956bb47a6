#!/usr/bin/env bash
# The work on a host. run.sh, pod.sh and prepare.sh call this over ssh; nobody needs to stay connected.
#
#   host.sh install EXTRAS     this commit and its requirements in .venv, once
#   host.sh fetch ...          grit-jax fetch, on the CPU
#   host.sh doctor             grit-jax doctor --selftest, together with all other hosts
#   host.sh start CONFIG       starts training in the background, or does nothing while it runs
#   host.sh follow             prints the log of the training, from its last lines on, until it ends
#   host.sh result             one line: running, ended CODE, stopped CODE (by `stop`), or none
#   host.sh stop               SIGTERM: training saves and ends with 75
#
# doctor and start read GRIT_NAME and GRIT_BUCKET. They and fetch read GRIT_SECRETS: pairs
# VARIABLE=SECRET, where SECRET is the name of a secret in Secret Manager. Its value goes from there into the environment
# and nowhere else.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
run=$HOME/grit-jax/run # log, lock and exit code of the training on this host
mkdir -p "$run"

secrets() {
  local - pair pairs secret
  set +x # a trace would show the values
  read -ra pairs <<<"${GRIT_SECRETS:-}"
  for pair in "${pairs[@]}"; do
    secret=$(gcloud secrets versions access latest --secret="${pair#*=}")
    export "${pair%%=*}=$secret"
  done
}

environment() {
  # shellcheck source=launch/env.sh
  source "$root/launch/env.sh"
  secrets
}

install() {
  exec 9>"$root/.install.lock"
  flock 9
  if [[ -e $root/.installed ]]; then return; fi
  # The system's Python may be too old for the package; uv brings one if installed.
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user --constraint "$root/constraints.txt" uv
  uv venv --quiet --allow-existing --python '>=3.11,<3.14' "$root/.venv"
  uv pip install --quiet --python "$root/.venv/bin/python" --constraint "$root/constraints.txt" "$root${1:+[$1]}"
  touch "$root/.installed"
}

doctor() {
  environment
  # Hosts wait for each other; one that never comes must not hold the others forever.
  timeout 1800 "$root/.venv/bin/grit-jax" doctor --selftest --checkpoint "$GRIT_BUCKET/launch/$GRIT_NAME/doctor"
}

fetch() {
  secrets
  JAX_PLATFORMS=cpu "$root/.venv/bin/grit-jax" fetch "$@"
}

# Only the training and its processes hold the lock: it is free once they are gone, however they ended.
running() { ! flock --shared --nonblock "$run/lock" true; }

start() {
  exec 9>"$run/lock"
  if ! flock --timeout 5 9; then return; fi # a question holds it for an instant, a training for longer
  environment
  rm -f "$run/code" "$run/stopped" "$run/pid"
  setsid --fork bash "${BASH_SOURCE[0]}" train "$1" >>"$run/log" 2>&1 </dev/null
}

train() {
  local code=0 log
  echo "$(hostname) $(date -u +%FT%TZ) $(basename "$root")"
  (echo "$BASHPID" >"$run/pid" && exec "$root/.venv/bin/grit-jax" train "$1") || code=$?
  echo "$code" >"$run/code"
  # A pod is deleted when its run has ended; its hosts' output stays in the bucket.
  log=$GRIT_BUCKET/launch/$GRIT_NAME/logs/$(hostname)-$(date -u +%Y%m%dT%H%M%SZ).log
  timeout 300 gcloud storage cp --quiet "$run/log" "$log" || echo "the log could not be copied to $log"
}

follow() {
  if ! running; then
    tail --lines=20 "$run/log"
    return
  fi
  tail --lines=20 --sleep-interval=0.1 -F "$run/log" &
  flock --shared "$run/lock" true
  sleep 0.3 # for what tail has not printed yet
  kill $!
}

result() {
  local word=ended
  if [[ -e $run/stopped ]]; then word=stopped; fi
  if running; then
    echo "$(hostname) running $(readlink "$HOME/grit-jax/current")"
  elif [[ -e $run/code ]]; then
    echo "$(hostname) $word $(<"$run/code")"
  else
    echo "$(hostname) none"
  fi
}

stop() {
  if ! running || [[ ! -e $run/pid ]]; then return; fi
  touch "$run/stopped"
  kill -TERM "$(<"$run/pid")"
}

"$@"
