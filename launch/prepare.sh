#!/usr/bin/env bash
# Fills a bucket with a config's model and data sets, from the Hugging Face Hub.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

usage() {
  cat <<'END'
usage: launch/prepare.sh [VM --zone ZONE] --config FILE --bucket gs://BUCKET [options] [-- --section.key=value ...]

  VM               a Compute Engine VM that does the work; without one, this machine does
  --config FILE    config of `grit-jax train`; what follows "--" changes it. Its paths models/ORG/NAME and data/SET
                   name what is fetched, and where it lies in the bucket
  --bucket gs://B  the bucket of launch/run.sh
  --downloads DIR  where downloads go (grit_jax/fetch in the user's cache)
  --keep-downloads leave them there
  --secret V=S     on a VM: environment variable V from secret S of Secret Manager, such as HF_TOKEN=hf-token
  --project P      project, if not gcloud's own default
  --connect-flag=F more flags for `gcloud compute ssh`
  --dry-run        print every command and run none

Run again, it goes on where it was, and does nothing when all is there. Exit codes: 0 done, 2 something to correct, 1 to
be run again.
END
}

config='' bucket='' options=()
option() {
  case $1 in
    --config) needs_value "$1" && config=$value ;;
    --bucket) needs_value "$1" && bucket=${value%/} ;;
    --downloads) needs_value "$1" && options+=(--downloads "$value") ;;
    --keep-downloads) options+=(--keep-downloads) ;;
    --secret) needs_value "$1" && secrets+=("$value") ;;
    *) die "unknown option $1; see --help" ;;
  esac
}
parse "$@"
check_secrets
check_config
if [[ -n $name ]]; then
  check_place
elif ((${#secrets[@]})); then
  die "--secret is for a VM; on this machine set the environment variable itself"
elif [[ -n $zone$project || ${#connect_flags[@]} != 0 ]]; then
  die "--zone, --project and --connect-flag are for a VM, whose NAME is missing; see --help"
fi

find_paths
((${#paths[@]})) || die "$config names no path models/... or data/..., so there is nothing to fetch"

# The arguments of `grit-jax fetch` for a path, in $fetch.
fetch_for() {
  case $1 in
    models/*) fetch=(model "${1#models/}") ;;
    data/*) fetch=(data "${1#data/}") ;;
  esac
  fetch+=("$bucket/$1" "${options[@]}")
}

if [[ -z $name ]]; then
  for path in "${paths[@]}"; do
    fetch_for "$path"
    # On the CPU, which has more memory.
    command=(env JAX_PLATFORMS=cpu "$bin/grit-jax" fetch "${fetch[@]}")
    show "${command[@]}"
    if ((!dry_run)); then "${command[@]}"; fi
  done
  exit
fi

find_source
upload_source
work="$(unpack_source) && $(host install '')"
for path in "${paths[@]}"; do
  fetch_for "$path"
  work+=" && env $(quoted GRIT_SECRETS="${secrets[*]}") $(host fetch "${fetch[@]}")"
done
ssh=(gcloud compute ssh "$name" "${common[@]}" "${connect_flags[@]}" --command="$work")
show "${ssh[@]}"
if ((!dry_run)); then "${ssh[@]}"; fi
