#!/usr/bin/env bash
# Inspects, stops and deletes pods made by launch/run.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

usage() {
  cat <<'END'
usage: launch/pod.sh VERB NAME --zone ZONE [--project P] [--connect-flag=F ...] [--dry-run] [options]

  status           the request, its nodes, and what every host does; with --bucket gs://B also the run's step and losses
  logs             prints what process 0 prints, until the training ends
  ssh -- COMMAND   runs a command on every host of every slice; --worker W and --node N choose (all). A pipeline is one
                   command as  bash -c 'ps aux | grep python'
  stop             lets the training save and end (exit code 75); the pod stays, at its price
  delete           deletes the pod; the bucket keeps the run

  --dry-run        print every command and run none
END
}

verb=${1:-}
case $verb in
  status | logs | ssh | stop | delete) shift ;;
  -h | --help)
    usage
    exit 0
    ;;
  *) die "VERB is one of status, logs, ssh, stop, delete; see launch/pod.sh --help" ;;
esac

worker=all node=all bucket=''
option() {
  case $1 in
    --worker) needs_value "$1" && worker=$value ;;
    --node) needs_value "$1" && node=$value ;;
    --bucket) needs_value "$1" && bucket=${value%/} ;;
    *) die "unknown option $1; see --help" ;;
  esac
}
parse "$@"
check_place
[[ $worker =~ ^(all|[0-9]+([-,][0-9]+)*)$ ]] || die "--worker $worker: all, or numbers such as 0, 1,3 or 0-3"
[[ $node == all ]] || is_count "$node" || die "--node is all or a number from 0"

found=$(list_nodes)
mapfile -t nodes < <(cut -d, -f1 <<<"$found" | sed '/^$/d')
if ((dry_run)); then nodes=("$name"); fi
if [[ $verb != status && $verb != delete ]]; then
  ((${#nodes[@]})) || die "$name has no node in $zone; launch/pod.sh status $name --zone $zone says what there is"
fi

case $verb in
  status)
    asked=$(request)
    IFS=, read -r state owner type <<<"$asked"
    if [[ -n $state ]]; then echo "queued resource: $state, $type${owner:+, made by launch/run.sh}"; fi
    if [[ -n $found ]]; then sed 's/^/node: /; s/,/, /g' <<<"$found"; fi
    if [[ -z $state && ${#nodes[@]} == 0 ]]; then echo "no pod"; fi
    if ((${#nodes[@]})); then results || echo "not all hosts answer"; fi
    if [[ -n $bucket ]]; then
      command=("$bin/grit-jax" status "$bucket/runs/$name")
      if ((dry_run)); then show "${command[@]}"; else "${command[@]}"; fi
    fi
    ;;
  logs) connect "${nodes[0]}" 0 "$(host follow)" ;;
  ssh)
    ((${#rest[@]})) || die "the command is missing: launch/pod.sh ssh NAME --zone ZONE -- COMMAND"
    if [[ $node != all ]]; then
      ((node < ${#nodes[@]} || dry_run)) || die "--node $node: $name has ${#nodes[@]}, counted from 0"
      nodes=("${nodes[node]-$name-$node}")
    fi
    code=0 pids=()
    for each in "${nodes[@]}"; do
      connect "$each" "$worker" "$(quoted "${rest[@]}")" &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    exit "$code"
    ;;
  stop) on_hosts try "$(host stop)" ;;
  delete)
    found=$(request)
    IFS=, read -r state owner _ <<<"$found"
    if [[ -n $state || $dry_run == 1 ]]; then
      [[ $owner == "$name" || $dry_run == 1 ]] ||
        die "$name was not made by launch/run.sh (no label grit_run=$name); gcloud can delete it"
      delete_pod 1
    elif ((${#nodes[@]})); then
      delete_pod 0
    else
      say "there is no $name in $zone"
    fi
    ;;
esac
