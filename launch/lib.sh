# shellcheck shell=bash
# What launch/run.sh, launch/pod.sh and launch/prepare.sh share: options, how commands are shown and run, the questions to
# gcloud, and how hosts get the source.
#
# Nothing is remembered between two calls. Whether a pod is there is gcloud's to say; whether this project made it, its
# label grit_run=NAME; what the run has done, its folder in the bucket; whether a host trains, a lock on that host.
set -euo pipefail
if ((BASH_VERSINFO[0] < 5)); then echo "error: bash 5 or newer is needed, this is $BASH_VERSION" >&2 && exit 2; fi
export CLOUDSDK_CORE_DISABLE_PROMPTS=1 # a question would wait for ever

name='' zone='' project='' dry_run=0 connect_flags=() nodes=()

die() {
  echo "error: $*" >&2
  exit 2
}

say() { if ((!dry_run)); then printf '%(%H:%M:%S)T %s\n' -1 "$*" >&2; fi; }

# Words as a shell reads them back.
quoted() {
  local word line=''
  for word; do
    [[ $word =~ ^[-A-Za-z0-9_./:=@,+%~]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Takes "--key value" and "--key=value" apart, calls the script's own `option KEY`, which may read $value, and leaves
# NAME in $name and what follows "--" in $rest. A key that takes a value says so by calling `needs_value`.
rest=() value='' has_value=0
parse() {
  local key
  while (($#)); do
    key=$1 value='' has_value=0
    shift
    case $key in
      --)
        rest=("$@")
        break
        ;;
      --*=*) value=${key#*=} key=${key%%=*} has_value=1 ;;
      --*) (($#)) && value=$1 ;;
    esac
    took_value=0
    case $key in
      --zone) needs_value "$key" && zone=$value ;;
      --project) needs_value "$key" && project=$value ;;
      --connect-flag) needs_value "$key" && connect_flags+=("$value") ;;
      --dry-run) dry_run=1 ;;
      -h | --help)
        usage
        exit 0
        ;;
      -*) option "$key" ;;
      *)
        [[ -z $name ]] || die "$key: one NAME is enough; see --help"
        name=$key
        ;;
    esac
    if ((took_value && !has_value)); then shift; fi
    if ((has_value && !took_value)); then die "$key takes no value"; fi
  done
  exec 3>&2
  if ((dry_run)); then exec 3>&1; fi
}

# Checks NAME and --zone, and leaves the flags that every gcloud command takes in $common.
check_place() {
  [[ -n $name ]] || die "NAME is missing; see --help"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] ||
    die "NAME $name: lower-case letters, digits and hyphens, from a letter on, at most 52"
  [[ -n $zone ]] || die "--zone is missing: where NAME is, such as us-east5-a"
  common=(--zone="$zone" ${project:+--project="$project"})
}

needs_value() {
  [[ -n $value && ($has_value == 1 || $value != --*) ]] || die "$1 needs a value; see --help"
  took_value=1
}

# Prints a command as it can be typed: to stdout in a dry run, else to stderr.
show() { echo "+ $(quoted "$@")" >&3; }

# Shows and runs a command of gcloud. 1 is a failure that may pass, 2 one that will not: a name, a permission, a flag.
try() {
  if ((!dry_run)); then show "$@"; fi
  quietly "$@"
}

# The same, shown in a dry run only: for questions that are asked again and again.
quietly() {
  local errors code=0
  if ((dry_run)); then
    show "$@"
    return
  fi
  { errors=$("$@" 2>&1 >&4) || code=$?; } 4>&1
  if ((code == 0)); then return 0; fi
  echo "$errors" >&2
  case "$errors $*" in
    *ALREADY_EXISTS*" create "* | *"already exists"*" create "*) return 0 ;; # by a call whose answer was lost
    *NOT_FOUND*" delete "*) return 0 ;;
    *PERMISSION_DENIED* | *"ermission denied"* | *"not have permission"* | *UNAUTHENTICATED* | *"active account"* | \
      *INVALID_ARGUMENT* | *NOT_FOUND* | *"unrecognized arguments"* | *"Invalid choice"*) return 2 ;;
  esac
  return 1
}

# STATE,OWNER,TYPE of the queued resource NAME; nothing when there is none. A list is asked for, not a
# description: "there is none" is then an empty answer and cannot be taken for a failure of the network.
request() {
  quietly gcloud compute tpus queued-resources list "${common[@]}" --filter="name~/$name\$" \
    --format='value[separator=","](state.state,tpu.nodeSpec[0].node.labels.grit_run,tpu.nodeSpec[0].node.acceleratorType.basename())'
}

# NAME,STATE,HEALTH,TYPE of every node of the run, in the order of their slices.
list_nodes() {
  local found
  found=$(quietly gcloud compute tpus tpu-vm list "${common[@]}" --filter="labels.grit_run=$name" \
    --format='value[separator=","](name.basename(),state,health,acceleratorType.basename())') || return
  sort -V <<<"$found" | sed '/^$/d'
}

# The gcloud command that runs COMMAND on hosts of a node: `to NODE WORKER COMMAND`, WORKER a number or all; leaves it in
# $ssh. A node that is created again under its name has new host keys, and one that is gone closes no connection.
to() {
  ssh=(gcloud compute tpus tpu-vm ssh "$1" "${common[@]}" --worker="$2" --strict-host-key-checking=no
    --ssh-flag=-oServerAliveInterval=30 "${connect_flags[@]}" --command="$3")
}

# Runs a command on every host of every slice at once: `on_hosts try COMMAND`, or `quietly`; fails when it fails on one.
# One gcloud call for each node, and not `queued-resources ssh`: that one leaves out nodes which it cannot reach and
# keeps the exit codes of workers under their number alone, over all nodes.
on_hosts() {
  local node pid code=0 pids=()
  for node in "${nodes[@]}"; do
    to "$node" all "$2"
    if ((dry_run)); then
      show "${ssh[@]}"
    else
      "$1" "${ssh[@]}" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

# Connects the terminal to hosts of a node: what they print is seen as it comes.
connect() {
  to "$@"
  show "${ssh[@]}"
  if ((!dry_run)); then "${ssh[@]}"; fi
}

# The commit that hosts install, in $commit, and where it is put in the bucket, in $archive.
# shellcheck disable=SC2154 # the scripts have set root and bucket
find_source() {
  commit=$(git -C "$root" rev-parse HEAD)
  if [[ -n $(git -C "$root" status --porcelain --untracked-files=no) ]]; then
    die "there are changes that are not committed; hosts install a commit: commit or stash them"
  fi
  archive=$bucket/launch/source/$commit.tar.gz
}

# Puts it there. Hosts need no access to the repository: that may be private, or have this commit on this machine only.
upload_source() {
  if ((dry_run)); then
    echo "+ $(quoted git -C "$root" archive --format=tar.gz "$commit") | $(quoted gcloud storage cp - "$archive")"
  else
    git -C "$root" archive --format=tar.gz "$commit" | try gcloud storage cp - "$archive"
  fi
}

# The command line that brings it from there to a host.
unpack_source() {
  local into=grit-jax/$commit fetch
  fetch="gcloud storage cat $(quoted "$archive") | tar -xzC $into"
  echo "set -o pipefail; mkdir -p $into && { test -e $into/.installed || $fetch; } && ln -sfn $commit grit-jax/current"
}

# The command line of launch/host.sh on a host.
host() { echo "bash grit-jax/current/launch/host.sh $(quoted "$@")"; }

# What every host does, one line each; a host on which nothing is installed yet does nothing.
results() { on_hosts quietly "if [ -e grit-jax/current ]; then $(host result); else echo new none; fi"; }

# Deletes the request and its nodes, or the plain VM. Only for what is labelled as this run's.
delete_pod() {
  if (($1)); then
    try gcloud compute tpus queued-resources delete "$name" "${common[@]}" --force --quiet
  else
    try gcloud compute tpus tpu-vm delete "$name" "${common[@]}" --quiet
  fi
}
