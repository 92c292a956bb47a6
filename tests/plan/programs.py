"""Hand-written scheduled HLO, as small as XLA:TPU's syntax allows."""

import textwrap

from grit_jax.plan.cost import estimate
from grit_jax.plan.topology import parse_topology

V5E = parse_topology("v5e-8")
CYCLES = 1.5e9  # of a v5e, per second
LINK = 45e9  # bytes per second of one of its links in one direction


def cycles(count):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def instructions(text):
    """Lines of instructions as XLA indents them."""
    return "\n".join(f"  {line.strip()}" for line in text.strip().split("\n"))


def module(entry, *others):
    """A program of an entry computation's instructions and other computations, each a whole text."""
    body = instructions(entry)
    whole = [textwrap.dedent(text).strip() for text in others]
    return "\n\n".join(
        ["HloModule test, is_scheduled=true", *whole, f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"]
    )


def cost(entry, *others, topology=V5E):
    return estimate(module(entry, *others), topology)


# The inside of a fusion that takes the compiler's cycles, as it multiplies.
BODY_OF_WORK = """
    %work (x: f32[8]) -> f32[8,8] {
      %x = f32[8]{0} parameter(0)
      ROOT %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={}, rhs_contracting_dims={}
    }
"""


def counted_loop(name, limit, work, step=1):
    """A condition and a body that runs `work` (lines) ceil(limit / step) times."""
    condition = f"""%{name}_cond (s: (s32[], f32[8])) -> pred[] {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant({limit})
  ROOT %more = pred[] compare(%i, %n), direction=LT
}}"""
    body = f"""%{name}_body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %p = f32[8]{{0}} get-tuple-element(%s), index=1
{instructions(work)}
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%next, %p)
}}"""
    return condition, body
