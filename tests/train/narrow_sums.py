"""The sums of a program that are made in bfloat16, as its jaxpr shows them."""

import math

import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Var, jaxprs_in_params

# What a handful of bfloat16 terms lose is what one rounding of their sum loses, about.
FEW = 4

_OVER_DEVICES = {"psum", "psum_invariant", "reduce_scatter"}
_PRODUCTS = {"dot_general", "ragged_dot_general"}


def _narrow(variable):
    return getattr(variable.aval, "dtype", None) == jnp.bfloat16


def _carries(equation):
    """Pairs of what a loop's body gets and what it hands on to its next trip."""
    if equation.primitive.name == "scan":
        body, first = equation.params["jaxpr"].jaxpr, equation.params["num_consts"]
        return zip(body.invars[first : first + equation.params["num_carry"]], body.outvars)
    if equation.primitive.name == "while":
        body = equation.params["body_jaxpr"].jaxpr
        return zip(body.invars[equation.params["body_nconsts"] :], body.outvars)
    return ()


def _terms(equation):
    """How many numbers each number of an equation's result is the sum of, not counting sums that are added up."""
    name, shapes = equation.primitive.name, [given.aval.shape for given in equation.invars]
    if name in _OVER_DEVICES or (name == "scatter-add" and not equation.params["unique_indices"]):
        return math.inf
    if name in ("reduce_sum", "reduce_window_sum"):
        return math.prod(shapes[0]) // math.prod(equation.outvars[0].aval.shape)
    return shapes[0][equation.params["axis"]] if name == "cumsum" else 1


def narrow_sums(jaxpr, *, in_kernel=False):
    """Yields (kind, shape, line of code) of every sum over more than `FEW` bfloat16 terms that is itself bfloat16.

    The kinds are names of primitives and `carry`, what a loop changes from trip to trip. Matrix products are left out:
    they add up in float32 and round once. Inside a Pallas kernel, where tiles of a product are added up, they are not.
    """
    added = {}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        where = source_info_util.summarize(equation.source_info)
        if equation.outvars and _narrow(equation.outvars[0]):
            terms = _terms(equation)
            if name in ("add", "add_any"):
                terms = sum(added.get(given, 1) for given in equation.invars if isinstance(given, Var))
                added[equation.outvars[0]] = terms
            if terms > FEW or (in_kernel and name in _PRODUCTS):
                yield name, equation.outvars[0].aval.shape, where
        for given, handed_on in _carries(equation):
            if _narrow(given) and given is not handed_on:
                yield "carry", given.aval.shape, where
        for program in jaxprs_in_params(equation.params):
            yield from narrow_sums(program, in_kernel=in_kernel or name == "pallas_call")
