"""Adapters beside their base: a checkpoint with only what was trained, which names the base and its fingerprint.

Opened, base and adapters are one model; the base is read where it was when the adapters were trained.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from grit_jax.errors import InputError
from grit_jax.model.fingerprint import fingerprint
from grit_jax.model.pretrained import AdapterMetadata, Pretrained
from grit_jax.model.transformer import Params, abstract_params
from grit_jax.parallel import sharding


def base_fingerprint(base: Pretrained, params: Params) -> str:
    """Identifies a base with these parameters, on devices of every type: `GritModel.fingerprint(rounded=True)`."""
    return fingerprint(params, base.architecture, base.embedding, base.tokenizer, rounded=True)


def check_base(source: Any, recorded: AdapterMetadata, found: str | None) -> None:
    """Checks that adapters belong to the base whose fingerprint is `found`.

    Raises:
      InputError: They were trained on another one; the message begins with `source`.
    """
    if recorded.fingerprint not in (None, found):
        raise InputError(
            f"{source}: its adapters were trained on {recorded.base} when that had the fingerprint "
            f"{recorded.fingerprint}; now it has {found}: put the old base back, or train new adapters"
        )


def on_base(source: Any, adapters: Pretrained, base: Pretrained) -> Pretrained:
    """A model of adapters and their base.

    Args:
      source: What to call the adapters in messages.
      adapters: The model; its `load` reads its `own` parameters, given their shardings.
      base: Their base.

    Raises:
      InputError: The base has another architecture, or lacks a parameter that they do not bring; from `load`: it has
        other weights.
    """
    recorded, names = adapters.adapter, adapters.own
    assert recorded
    if base.architecture != adapters.architecture:
        raise InputError(
            f"{source}: {recorded.base}, on which it was trained, now has another architecture; put it back"
        )
    of_base = flatten_dict(abstract_params(base.model), sep=".")
    if missing := sorted(flatten_dict(abstract_params(adapters.model), sep=".").keys() - of_base.keys() - names):
        raise InputError(f"{source}: neither it nor its base {recorded.base} holds {', '.join(missing)}")

    def load(shardings: Any, dtype: DTypeLike = jnp.float32) -> Params:
        wanted = flatten_dict(shardings, sep=".")
        whole = sharding.replicated(next(iter(wanted.values())).mesh)
        placed = unflatten_dict({path: wanted.get(path, whole) for path in of_base}, sep=".")
        # The fingerprint is of weights rounded to bfloat16, from float32 or from that.
        exact = dtype if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32
        params = base.load(placed, exact)
        if recorded.fingerprint is not None:
            check_base(source, recorded, base_fingerprint(base, params))
        own = adapters.load(unflatten_dict({path: wanted[path] for path in names & wanted.keys()}, sep="."), dtype)
        held = flatten_dict(params, sep=".") | flatten_dict(own, sep=".")
        return unflatten_dict({path: held[path].astype(dtype) for path in wanted}, sep=".")

    return dataclasses.replace(adapters, load=load)
