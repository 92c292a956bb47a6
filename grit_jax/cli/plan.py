"""The command `grit-jax plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from grit_jax.cli.command import JSON, argument, command, flag, number
from grit_jax.config import load_config
from grit_jax.config.ranges import FINITE, Range

_DOES_NOT_FIT = 3
_FILL = Range("must be over 0 and at most 1", lambda value: 0 < value <= 1)


@command(
    "compile a config's train step for a TPU topology, without a TPU: does it fit, what does it cost",
    argument("config", metavar="CONFIG", help="YAML file; --section.key=value changes it"),
    argument("--topology", required=True, metavar="NAME", help="such as v5p-128 or v5litepod-256"),
    number("--slices", "N", "slices of that topology", 1, FINITE),
    (
        number("--fill", "F", "average length of texts as a share of their limits", 1.0, _FILL),
        argument("--data", metavar="PATH", help="take the lengths of texts from this folder of GRIT data"),
    ),
    JSON,
    flag("--top", "show the seconds of each kind of work, and the source lines of transfers that nothing hides"),
    (
        flag(
            "--search", "find the fastest rematerialisation and rows of a layer that fit, compiling each that is judged"
        ),
        flag("--no-compile", "check in seconds that topology, mesh, batch and model fit together"),
    ),
    number("--compile", "N", "most programs that --search compiles", 12),
    overrides="",
    examples="""\
  grit-jax plan configs/gritlm_7b_v5p_128.yaml --topology v5p-128
  grit-jax plan configs/gritlm_7b_v5p_128.yaml --topology v5p-128 --slices 2 --fill 0.6 --json
  grit-jax plan configs/gritlm_7b_v5p_128.yaml --topology v5p-128 --data data/medi2 --model.tokenizer=tokenizer.model
  grit-jax plan configs/gritlm_7b_v5p_128.yaml --topology v5litepod-256 --search
  grit-jax plan configs/gritlm_7b_v5p_128.yaml --topology v5p-256 --no-compile
""",
)
def run(args: argparse.Namespace) -> int:
    """Plans a config; 0 if it fits, 3 if it does not."""
    config = load_config(args.config, args.overrides)

    from grit_jax.data.streams import trained_streams
    from grit_jax.plan import outline
    from grit_jax.plan.presentation import as_json, as_lines
    from grit_jax.plan.program import make_plan, planned_config
    from grit_jax.plan.topology import parse_topology
    from grit_jax.plan.work import lengths_at_limits, lengths_of_data

    topology = parse_topology(args.topology, slices=args.slices)
    config = planned_config(config)
    if args.data:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=args.data))
    streams = trained_streams(config)
    lengths = lengths_of_data(config, streams) if args.data else lengths_at_limits(streams, args.fill)
    if args.no_compile:
        found = outline.make_outline(config, topology, lengths)
        print(json.dumps(outline.as_json(found)) if args.json else "\n".join(outline.as_lines(found)))
        return 0 if found.may_fit else _DOES_NOT_FIT
    recommended = {}
    if args.search:
        from grit_jax.plan.tuning import tune

        found = tune(config, topology, lengths, most=args.compile, say=lambda line: print(line, file=sys.stderr))
        plan, config, recommended = found.plan, found.config, {"recommended": found.overrides}
    else:
        plan = make_plan(config, topology, lengths)
    if args.json:
        print(json.dumps(recommended | as_json(plan)))
    else:
        print("\n".join([*as_lines(plan, config, top=args.top), *recommended.get("recommended", [])]))
    return 0 if plan.fits else _DOES_NOT_FIT
