"""The objectives of the streams, whose data are in `grit_jax.data.streams`."""

from __future__ import annotations

from grit_jax.config import Config
from grit_jax.data.streams import STREAMS, trained_streams
from grit_jax.train.objectives.embedding import ContrastiveObjective
from grit_jax.train.objectives.generative import NextTokenObjective
from grit_jax.train.objectives.objective import Objective

OBJECTIVES = {"embedding": ContrastiveObjective, "generative": NextTokenObjective}

if unpaired := STREAMS.keys() ^ OBJECTIVES.keys():
    raise ImportError(f"data/streams and train/objectives must list the same streams; one lacks {sorted(unpaired)}")


def trained_objectives(config: Config) -> list[Objective]:
    """The objectives of the streams that `train.mode` trains."""
    return [OBJECTIVES[stream.name](stream, config) for stream in trained_streams(config)]
