# shellcheck shell=bash
# The environment of grit-jax on a TPU host, with the reason for each variable. launch/host.sh sources this for every
# command. Reads GRIT_BUCKET.

# A host whose TPU cannot be used ends with an error instead of training on its CPU.
export JAX_PLATFORMS=tpu,cpu

# Compiled programs are kept in the bucket. A 7B step takes minutes to compile, and a new node has an empty disk: without
# the program cache every preemption costs them again. A program's key holds its content, options and chips, so runs can
# share one folder.
if [[ -n ${GRIT_BUCKET:-} ]]; then export JAX_COMPILATION_CACHE_DIR="$GRIT_BUCKET/compiled"; fi

# Log lines leave the process when printed, not when a buffer is full.
export PYTHONUNBUFFERED=1
