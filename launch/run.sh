#!/usr/bin/env bash
# Trains on a TPU pod from first to last step: plans, creates, installs, tests, trains, and starts over if that helps.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

usage() {
  cat <<'END'
usage: launch/run.sh NAME --type TYPE --zone ZONE --config FILE --bucket gs://BUCKET [options] [-- --section.key=value ...]

  NAME             the run; its pod is called the same, and its folder is BUCKET/runs/NAME
  --type TYPE      accelerator type, such as v5p-128 or v5litepod-256
  --zone ZONE      such as us-east5-a
  --config FILE    config of `grit-jax train`; what follows "--" changes it
  --bucket gs://B  where source, config, compiled programs, logs and checkpoints are kept, in the zone's region
  --slices N       slices of that type, one job over all of them (1)
  --spot           spot capacity: cheaper, and taken away when someone else needs it
  --flex DURATION  flex-start capacity for at most that long at a time, such as 3d; needs `gcloud alpha`
  --tpu-vm         a plain TPU VM, now or not at all, instead of a queued resource
  --runtime-version V  software of the TPU VM (by default the one for TYPE)
  --create-flag=F  more flags for creating, such as --create-flag=--service-account=me@example.com; may be repeated
  --connect-flag=F more flags for `gcloud compute tpus tpu-vm ssh`, such as --connect-flag=--internal-ip
  --project P      project, if not gcloud's own default
  --extras E       extras of the package to install (tpu), such as tpu,wandb
  --secret V=S     environment variable V of the training from secret S of Secret Manager; may be repeated
  --retries N      failures in a row, without a new checkpoint in between, after which to give up (10)
  --wait SECONDS   pause after the first of them, doubled after each further one up to 15 minutes (30)
  --poll SECONDS   pause between two looks at what is being created (30)
  --no-plan        do not compile the step first to see whether it fits
  --keep           leave the pod when the run has ended, at its price
  --dry-run        print every command and run none; of the config and its step all is checked that takes seconds

Exit codes: 0 done, 2 something to correct (never tried again), 3 the plan does not fit, 75 stopped with
`launch/pod.sh stop`, 1 given up, or Google was not reached before anything was created. Interrupting this script leaves
the pod and the training as they are; the same command goes on with them.
END
}

type='' config='' bucket='' slices=1 spot=0 flex='' plain=0 runtime='' create_flags=() extras=tpu
retries=10 wait=30 poll=30 plan=1 keep=0
option() {
  case $1 in
    --type) needs_value "$1" && type=$value ;;
    --config) needs_value "$1" && config=$value ;;
    --bucket) needs_value "$1" && bucket=${value%/} ;;
    --slices) needs_value "$1" && slices=$value ;;
    --spot) spot=1 ;;
    --flex) needs_value "$1" && flex=$value ;;
    --tpu-vm) plain=1 ;;
    --runtime-version) needs_value "$1" && runtime=$value ;;
    --create-flag) needs_value "$1" && create_flags+=("$value") ;;
    --extras) needs_value "$1" && extras=$value ;;
    --secret) needs_value "$1" && secrets+=("$value") ;;
    --retries) needs_value "$1" && retries=$value ;;
    --wait) needs_value "$1" && wait=$value ;;
    --poll) needs_value "$1" && poll=$value ;;
    --no-plan) plan=0 ;;
    --keep) keep=1 ;;
    *) die "unknown option $1; see --help" ;;
  esac
}
parse "$@"
check_secrets
check_place
check_config

[[ -n $type ]] || die "--type is missing; see --help"
for key in slices retries wait poll; do is_count "${!key}" || die "--$key ${!key} is not a whole number"; done
((slices >= 1)) || die "--slices $slices: at least 1"
[[ -z $flex || $spot == 0 ]] || die "--spot and --flex: a pod is one or the other"
if ((plain)) && [[ $slices != 1 || -n $flex ]]; then die "--tpu-vm: slices and flex-start need a queued resource"; fi
type=${type/#v5e-/v5litepod-} # the name that gcloud knows
if [[ -z $runtime ]]; then
  case $type in # https://cloud.google.com/tpu/docs/runtimes
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v7* | tpu7*) die "--type $type: v7 TPUs are had through GKE only, see docs/launch-xpk.md" ;;
    *) die "--type $type is unknown here; name its --runtime-version" ;;
  esac
fi

folder=$bucket/runs/$name
find_source
uploaded_config=$bucket/launch/$name/config.yaml
make_config=("$bin/python" "$root/launch/config.py" "$config" "$folder" "${rest[@]}")

# Two of these scripts for one run would both create and delete.
if ((!dry_run)); then
  exec 8>"${TMPDIR:-/tmp}/grit-jax-$UID-$name.lock"
  flock --nonblock 8 || die "another launch/run.sh looks after $name on this machine; launch/pod.sh logs shows what it does"
fi
trap 'say "interrupted; pod and training go on. The same command goes on with them; launch/pod.sh stop, delete end them"
  exit 130' INT

# --- failures ---------------------------------------------------------------------------------------------------------

failures=0 newest=-1
ours=0 # whether there is a pod of this run, as far as is known
seen=0 # whether it has been on gcloud's list since it was made

# Ends the script, and deletes the pod unless it is to be kept.
finish() {
  say "$2"
  if ((ours && !keep)); then
    delete_pod $((!plain)) || say "NOT DELETED, and still to be paid for: launch/pod.sh delete $name --zone $zone"
  elif ((ours)); then
    say "the pod is kept, at its price: launch/pod.sh delete $name --zone $zone"
  fi
  exit "$1"
}

# Handles a failure: `failed CODE WHAT`. 2 ends the run; after other codes it waits, longer each time, and returns 1.
failed() {
  local pause step
  if (($1 == 2)); then finish 2 "$2; trying again would not help"; fi
  # A run that makes progress is not failing: one preempted every hour goes on for as long as it takes.
  step=$(newest_step) || step=$newest
  if ((step > newest)); then newest=$step failures=0; fi
  failures=$((failures + 1))
  if ((failures > retries)); then finish 1 "$2; given up after $failures failures without a new checkpoint"; fi
  pause=$((wait << (failures > 10 ? 10 : failures - 1)))
  pause=$((pause > 900 ? 900 : pause))
  say "$2; failure $failures of at most $retries, next try in $pause s"
  sleep "$pause"
  return 1
}

# Step of the newest checkpoint in the bucket, 0 without one; fails if the bucket cannot be read.
newest_step() {
  local found step
  found=$(listed "$folder/checkpoints/") || return
  step=$(sed -n 's#.*/\([0-9]\+\)/$#\1#p' <<<"$found" | sort -n | tail -n 1)
  echo "$((10#${step:-0}))"
}

# --- the pod ----------------------------------------------------------------------------------------------------------

# STATE,OWNER,TYPE of the whole pod; nothing if it does not exist.
look() {
  if ((plain)); then
    quietly gcloud compute tpus tpu-vm list "${common[@]}" --filter="name~/$name\$" \
      --format='value[separator=","](state,labels.grit_run,acceleratorType.basename())'
  else
    request
  fi
}

# Requests the pod. A second request for it changes nothing: gcloud answers that it exists.
create() {
  local track=() flags=(--accelerator-type="$type" --labels=grit_run="$name")
  if ((spot)); then flags+=(--spot); fi
  if ((plain)); then
    try gcloud compute tpus tpu-vm create "$name" "${common[@]}" --version="$runtime" "${flags[@]}" "${create_flags[@]}"
    return
  fi
  if [[ -n $flex ]]; then track=(alpha) flags+=(--provisioning-model=flex-start --max-run-duration="$flex"); fi
  if ((slices == 1)); then flags+=(--node-id="$name"); else flags+=(--node-count="$slices" --node-prefix="$name"); fi
  refuse_strangers || return
  try gcloud "${track[@]}" compute tpus queued-resources create "$name" "${common[@]}" --runtime-version="$runtime" \
    "${flags[@]}" "${create_flags[@]}"
}

# Ends the script if a node of the pod already exists and belongs to somebody else: the request would fail, and deleting
# such a request might harm that node.
refuse_strangers() {
  local names=$name found
  if ((slices > 1)); then names+='-[0-9]+'; fi
  found=$(quietly gcloud compute tpus tpu-vm list "${common[@]}" --filter="name~/$names\$" \
    --format='value[separator=","](labels.grit_run,name.basename())') || return
  if grep -q "^[^,]*,." <<<"$found" && grep -qv "^$name," <<<"$found"; then
    finish 2 "there is a node of that name, which launch/run.sh did not make (${found//$'\n'/; }): take another name"
  fi
}

# Deletes a pod that will not come back: `replace WHY`; the next round creates it again.
replace() {
  say "$name: $1; making it again"
  delete_pod $((!plain)) || failed $? "$name cannot be deleted" || return
  ours=0 seen=0
}

# Returns when all nodes are ready, and leaves their names in $nodes; 1 if the round must begin again.
provision() {
  local found state owner its_type said='' looks=0
  while true; do
    found=$(look) || failed $? "$name cannot be looked up" || return
    IFS=, read -r state owner its_type <<<"$found"
    if [[ -n $state && $owner != "$name" ]]; then
      ours=0
      finish 2 "$name is there, but launch/run.sh did not make it (no label grit_run=$name): take another name"
    elif [[ -n $state && $its_type != "$type" ]]; then
      ours=0
      finish 2 "$name is a $its_type, not a $type: launch/pod.sh delete $name --zone $zone, or take another name"
    fi
    if [[ -n $state ]]; then ours=1 seen=1; fi
    if [[ -n $state && $state != "$said" ]]; then
      say "$name: $state"
      said=$state
    fi
    case $state in
      '')
        # A preempted node stays on the list until it is deleted.
        if ((seen)); then
          ours=0
          finish 1 "somebody else has deleted $name; not making it again"
        fi
        create || failed $? "$name cannot be created" || return
        ours=1
        if ((dry_run)); then
          list_nodes
          nodes=("$name")
          if ((slices > 1)); then mapfile -t nodes < <(seq -f "$name-%g" 0 $((slices - 1))); fi
          return 0
        fi
        ;;
      ACTIVE | READY)
        found=$(list_nodes) || failed $? "the nodes of $name cannot be listed" || return
        if all_ready "$found"; then return 0; fi
        if grep -q ',\(PREEMPTED\|TERMINATED\),' <<<"$found"; then
          replace "a node is gone"
          return 1
        fi
        looks=$((looks + 1))
        if ((looks == 60)); then
          failed 1 "the nodes of $name are not well: ${found//$'\n'/; }" || true
          replace "its nodes are not well"
          return 1
        fi
        ;;
      FAILED)
        failed 1 "$name could not be provided" || true
        replace FAILED
        return 1
        ;;
      SUSPENDED | PREEMPTED | TERMINATED)
        replace "$state"
        return 1
        ;;
      STOPPED) keep=1 && finish 1 "somebody has stopped $name" ;;
      *) ;; # on its way, or on its way out
    esac
    sleep "$poll"
  done
}

# Whether all nodes of a list are ready and healthy; leaves their names in $nodes.
all_ready() {
  nodes=()
  local node state health
  while IFS=, read -r node state health _; do
    case $state,$health in
      READY, | READY,HEALTHY | READY,HEALTH_UNSPECIFIED) nodes+=("$node") ;;
    esac
  done <<<"$1"
  ((${#nodes[@]} == slices))
}

# --- the hosts --------------------------------------------------------------------------------------------------------

# Every host gets the commit as an archive from the bucket.
install() {
  on_hosts try "$(unpack_source) && $(host install "$extras")"
}

# Runs a command of launch/host.sh that needs facts of the run.
on_hosts_of_run() {
  local settings=(GRIT_NAME="$name" GRIT_BUCKET="$bucket" GRIT_SECRETS="${secrets[*]}")
  on_hosts try "env $(quoted "${settings[@]}") $(host "$@")"
}

start_training() {
  on_hosts_of_run start "$uploaded_config" || failed 1 "training cannot be started on all hosts"
}

# Trains, or follows a running training, until it has ended; 1 if the round must begin again. Anything that goes wrong on
# a host may mean that the host is gone: the next round finds out.
train() {
  local found codes logs="what every host printed is in $bucket/launch/$name/logs"
  found=$(results) || failed 1 "not all hosts answer" || return
  if [[ $found == *" running "* ]]; then
    say "$name trains already"
    # A start did not reach all hosts; those that it reached wait for the others.
    if grep -q ' none$' <<<"$found"; then start_training || return; fi
  else
    install || failed 1 "the package cannot be installed on all hosts" || return
    on_hosts_of_run doctor || failed 1 "grit-jax doctor found a problem" || return
    start_training || return
  fi
  while true; do
    # Worker 0 of the first slice is process 0, which prints for all. The connection may end before the training.
    connect "${nodes[0]}" 0 "$(host follow)" 8>&- || true
    found=$(results) || failed 1 "hosts are gone, or do not answer" || return
    if ((dry_run)); then return; fi
    if [[ $found != *" running "* ]]; then break; fi
    sleep "$poll"
  done
  codes=$(cut -d' ' -f2- <<<"$found" | sort | uniq -c | tr -s ' \n' ' ')
  say "hosts:$codes"
  if [[ $found == *" stopped "* ]]; then keep=1 && finish 75 "$name was stopped"; fi
  if grep -q ' ended 2$' <<<"$found"; then finish 2 "training refused its input; $logs"; fi
  if ! grep -qv ' ended 0$' <<<"$found"; then return 0; fi
  failed 1 "training broke off; $logs"
}

# --- the run ----------------------------------------------------------------------------------------------------------

# Reading the config queries and changes nothing, so a dry run does it too and refuses the same configs.
show "${make_config[@]}"
resolved=$("${make_config[@]}")
# The data of launch/prepare.sh must exist before anything is rented.
find_paths
for path in "${paths[@]}"; do
  found=$(listed "$bucket/$path/fetch.json")
  [[ -n $found || $dry_run == 1 ]] ||
    die "$bucket/$path/fetch.json is not there: launch/prepare.sh --config $(quoted "$config") --bucket" \
      "$(quoted "$bucket") brings it from the Hugging Face Hub; data of your own are copied to a folder of another name," \
      "and named by their gs:// address"
done

found=$(look)
if [[ -z $found ]] && ((plan)); then
  command=("$bin/grit-jax" plan "$config" --topology "$type" --slices "$slices")
  show "${command[@]}" "${rest[@]}"
  code=0
  if ((dry_run)); then
    "${command[@]}" --no-compile "${rest[@]}" >&2 || code=$?
  else
    "${command[@]}" "${rest[@]}" || code=$?
  fi
  if ((code == 3)); then echo "error: $config does not fit $slices x $type; nothing was created" >&2; fi
  if ((code)); then exit "$code"; fi
fi

upload_source
if ((dry_run)); then
  echo "+ $(quoted "${make_config[@]}") | $(quoted gcloud storage cp - "$uploaded_config")"
else
  try gcloud storage cp - "$uploaded_config" <<<"$resolved"
fi

until provision && train; do :; done
finish 0 "$name is done: $folder"
