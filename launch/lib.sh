# shellcheck shell=bash
# Shared by launch/run.sh, launch/pod.sh and launch/prepare.sh: options, showing and running commands, queries to gcloud,
# and how hosts get the source.
# Nothing is remembered between calls. gcloud says whether a pod exists; its label grit_run=NAME, whether this project
# made it; the run's folder in the bucket, what the run has done; a lock on a host, whether the host trains.
# Messages never repeat an argument that may be a secret's value: neither that of --secret, nor a stray word.
set -euo pipefail
if ((BASH_VERSINFO[0] < 5)); then echo "error: bash 5 or newer is needed, this is $BASH_VERSION" >&2 && exit 2; fi
export CLOUDSDK_CORE_DISABLE_PROMPTS=1 # a question would wait forever

name='' zone='' project='' dry_run=0 connect_flags=() nodes=() secrets=()
bin=${GRIT_BIN:-${root:?}/.venv/bin}

die() {
  echo "error: $*" >&2
  exit 2
}

say() { if ((!dry_run)); then printf '%(%H:%M:%S)T %s\n' -1 "$*" >&2; fi; }

# Words quoted so that a shell reads them back.
quoted() {
  local word line=''
  for word; do
    [[ $word =~ ^[-A-Za-z0-9_./:=@,+%]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Splits "--key value" and "--key=value", calls the script's own `option KEY`, which may read $value, and leaves NAME in
# $name and the words after "--" in $rest. A key that takes a value calls `needs_value`.
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
        [[ -z $name ]] || die "there is a word too many: one NAME, then options; see --help"
        name=$key
        ;;
    esac
    if ((took_value && !has_value)); then shift; fi
    if ((has_value && !took_value)); then die "$key takes no value"; fi
  done
  exec 3>&2
  if ((dry_run)); then exec 3>&1; fi
}

# Checks NAME and --zone, and leaves the flags of every gcloud command in $common.
check_place() {
  [[ -n $name ]] || die "NAME is missing; see --help"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] ||
    die "NAME begins with a letter and has lower-case letters, digits and hyphens, at most 52; see --help"
  [[ -n $zone ]] || die "--zone is missing: where NAME is, such as us-east5-a"
  common=(--zone="$zone" ${project:+--project="$project"})
  if ((!dry_run)) && ! command -v gcloud >/dev/null; then
    die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  fi
}

# Checks --config and --bucket, and that there is a program to read the config.
# shellcheck disable=SC2154 # set by the calling scripts
check_config() {
  [[ -n $config ]] || die "--config is missing; see --help"
  [[ -n $bucket ]] || die "--bucket is missing; see --help"
  [[ $bucket == gs://?* ]] || die "--bucket $bucket must start with gs://"
  [[ -x $bin/python ]] || die "$bin/python is not there; make install brings it"
  if [[ $config == -* ]]; then config=./$config; fi
}

# Checks the pairs of --secret. Commands with them are printed, and appear in the process lists of this machine and the
# hosts, so anything that may be a value is refused here.
check_secrets() {
  local pair word wanted='--secret takes VARIABLE=NAME, NAME being that of a secret in Secret Manager'
  for pair in "${secrets[@]}"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_-]{1,255}$ ]] || die "$wanted; what was given is not shown"
    for word in "${pair%%=*}" "${pair#*=}"; do
      if looks_secret "$word"; then
        die "$wanted; what was given looks like a value and is not shown. Put it into Secret Manager (docs/pods.md)," \
          "under a name that looks like none, such as hf-token"
      fi
    done
  done
}

# Whether a word looks like a secret rather than the name of one: begins like a token, or is long and unbroken.
looks_secret() {
  [[ $1 =~ ^(hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA|AIza|ya29|wandb_v1_) ]] ||
    [[ $1 =~ [A-Za-z0-9]{24} && $1 =~ [0-9] ]]
}

# Whether a word is a number that arithmetic reads correctly: 08 is not a number to bash, and more digits overflow.
is_count() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; }

# Leaves in $paths the paths that launch/prepare.sh fills for the config, such as data/medi2; ends the script if the
# config is refused. Each path ends with a NUL, as it may hold anything else.
# shellcheck disable=SC2034,SC2154 # the scripts use paths and set config
find_paths() {
  mapfile -d '' -t paths < <("$bin/python" "$root/launch/config.py" --fetched "$config" "${rest[@]}")
  wait "$!" || exit
}

needs_value() {
  [[ -n $value && ($has_value == 1 || $value != --*) ]] || die "$1 needs a value; see --help"
  took_value=1
}

# Prints a command as one would type it: to stdout in a dry run, else to stderr.
show() { echo "+ $(quoted "$@")" >&3; }

# Shows and runs a gcloud command. 1 is a temporary failure, 2 a permanent one: nobody is logged in, a permission is
# missing, or a name or a flag is wrong. gcloud's message comes first, then the remedy.
try() {
  if ((!dry_run)); then show "$@"; fi
  quietly "$@"
}

# The same, shown only in a dry run: for queries made again and again. A query for something missing gives an empty
# answer, so that it cannot be taken for a failure, nor a failure for it.
quietly() {
  local errors code=0
  if ((dry_run)); then
    show "$@"
    return
  fi
  { errors=$("$@" 2>&1 >&4) || code=$?; } 4>&1
  if ((code == 0)); then return 0; fi
  if [[ "$errors $*" == *"matched no objects"*" storage ls "* ]]; then return 0; fi
  printf '%s\n' "$errors" >&2
  case "$errors $*" in
    *" tpu-vm ssh "*) ;; # mostly the words of what ran on the host
    *ALREADY_EXISTS*" create "* | *"already exists"*" create "*) return 0 ;; # by a call whose answer was lost
    *NOT_FOUND*" delete "*) return 0 ;;
    # Before the login: if the network fails while a token is renewed, gcloud says to log in, too.
    *"Max retries exceeded"* | *"Failed to resolve"* | *"network connectivity"* | *"onnection refused"* | \
      *"onnection reset"* | *"onnection aborted"* | *"timed out"*)
      echo "gcloud does not reach Google from this machine; that may pass" >&2
      ;;
    *"active account"* | *"gcloud auth login"* | *UNAUTHENTICATED* | *"HTTPError 401"* | *"nvalid Credentials"*)
      echo "error: nobody is logged in to gcloud on this machine, or no longer: gcloud auth login" >&2
      return 2
      ;;
    *PERMISSION_DENIED* | *"ermission denied"* | *"not have permission"* | *"HTTPError 403"*)
      echo "error: the account of gcloud may not do this, or nothing has that name, which Google answers in the same" \
        "way: docs/pods.md has the roles, gcloud auth list the account" >&2
      return 2
      ;;
    *INVALID_ARGUMENT* | *NOT_FOUND* | *"not found: 404"* | *"unrecognized arguments"* | *"Invalid choice"* | \
      *"Error parsing ["* | *"property ["*"is not currently set"*) return 2 ;;
  esac
  return 1
}

# The objects at a gs:// address, one per line; nothing if there are none.
listed() { quietly gcloud storage ls "$1"; }

# STATE,OWNER,TYPE of the queued resource NAME; nothing if there is none. This asks for a list, not a description: "there
# is none" is then an empty answer and cannot be taken for a network failure.
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
# $ssh. A node created again under its name has new host keys, and a node that is gone closes no connection.
to() {
  ssh=(gcloud compute tpus tpu-vm ssh "$1" "${common[@]}" --worker="$2" --strict-host-key-checking=no
    --ssh-flag=-oServerAliveInterval=30 "${connect_flags[@]}" --command="$3")
}

# Runs a command on every host of every slice at once: `on_hosts try COMMAND`, or `quietly`; fails if one host fails.
# One gcloud call per node, not `queued-resources ssh`: that leaves out nodes that it cannot reach, and keeps the exit
# codes of workers only by their number, across all nodes.
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

# Connects the terminal to hosts of a node, to show their output as it comes.
connect() {
  to "$@"
  show "${ssh[@]}"
  if ((!dry_run)); then "${ssh[@]}"; fi
}

# The commit that hosts install, in $commit, and its address in the bucket, in $archive.
# shellcheck disable=SC2154 # the scripts set root and bucket
find_source() {
  commit=$(git -C "$root" rev-parse HEAD) || die "$root is no clone with a commit; hosts install a commit: git clone"
  if [[ -n $(git -C "$root" status --porcelain --untracked-files=no) ]]; then
    die "there are changes that are not committed; hosts install a commit: commit or stash them"
  fi
  archive=$bucket/launch/source/$commit.tar.gz
}

# Uploads it. Hosts need no access to the repository, which may be private, or have this commit only on this machine.
upload_source() {
  if ((dry_run)); then
    echo "+ $(quoted git -C "$root" archive --format=tar.gz "$commit") | $(quoted gcloud storage cp - "$archive")"
  else
    git -C "$root" archive --format=tar.gz "$commit" | try gcloud storage cp - "$archive"
  fi
}

# The command line that fetches it from there to a host.
unpack_source() {
  local into=grit-jax/$commit fetch
  fetch="gcloud storage cat $(quoted "$archive") | tar -xzC $into"
  echo "set -o pipefail; mkdir -p $into && { test -e $into/.installed || $fetch; } && ln -sfn $commit grit-jax/current"
}

# The command line of launch/host.sh on a host.
host() { echo "bash grit-jax/current/launch/host.sh $(quoted "$@")"; }

# The state of every host, one line each; a host without an installation does nothing.
results() { on_hosts quietly "if [ -e grit-jax/current ]; then $(host result); else echo new none; fi"; }

# Deletes the request and its nodes, or the plain VM; only those labelled as this run's.
delete_pod() {
  if (($1)); then
    try gcloud compute tpus queued-resources delete "$name" "${common[@]}" --force --quiet
  else
    try gcloud compute tpus tpu-vm delete "$name" "${common[@]}" --quiet
  fi
}
