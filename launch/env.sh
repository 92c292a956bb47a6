# shellcheck shell=bash
# The environment of grit-jax on a TPU host, with the reason for each variable. launch/host.sh sources this for every
# command; launch/run.sh takes the compiler's flags from here for `grit-jax plan`, so that it plans what will run.
#
# Reads GRIT_TYPE (accelerator type, such as v5p-128), GRIT_SLICES and, on hosts, GRIT_BUCKET.

# A host whose TPU cannot be used ends with an error instead of training on its CPU.
export JAX_PLATFORMS=tpu,cpu

# Compiled programs are kept in the bucket. A 7B step takes minutes to compile, and a new node has an empty disk: without
# the program cache every preemption costs them again. A program's key holds its content, flags and chips, so runs can
# share one folder.
if [[ -n ${GRIT_BUCKET:-} ]]; then export JAX_COMPILATION_CACHE_DIR="$GRIT_BUCKET/compiled"; fi

# Log lines leave the process when printed, not when a buffer is full.
export PYTHONUNBUFFERED=1

# The TPU compiler's flags, by chip generation: those that Google's training recipes for these chips add to the
# defaults, which already overlap collectives with computation. libtpu 0.0.42.1 accepts them (an unknown flag ends it);
# their gain here has not been measured. `grit-jax plan` under LIBTPU_INIT_ARGS compares settings.
libtpu_flags=()
case $GRIT_TYPE in
  v6e-*)
    # More of the core's vector memory for one fusion, 96 MiB: larger tiles read less from HBM, whose bandwidth a v6e
    # runs out of first.
    libtpu_flags+=(--xla_tpu_scoped_vmem_limit_kib=98304)
    ;;
esac
if ((GRIT_SLICES > 1)); then
  # Between slices gradients travel over the data-centre network, ten times slower than the links inside a slice: sum
  # them during the backward pass, in pieces of unequal size.
  libtpu_flags+=(--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true)
fi
export LIBTPU_INIT_ARGS="${libtpu_flags[*]}"
