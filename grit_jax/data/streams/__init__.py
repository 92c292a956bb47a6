"""The streams that steps consist of, each in a file of its own; `grit_jax.train.objectives` has their other side."""

from __future__ import annotations

from grit_jax.config import Config
from grit_jax.data.streams.base import Stream
from grit_jax.data.streams.embedding import EmbeddingStream
from grit_jax.data.streams.generative import GenerativeStream

STREAMS: dict[str, type[EmbeddingStream] | type[GenerativeStream]] = {
    stream.name: stream for stream in (EmbeddingStream, GenerativeStream)
}


def all_streams(config: Config) -> list[Stream]:
    """Every stream under the settings of a config."""
    return [stream(config) for stream in STREAMS.values()]


def trained_streams(config: Config) -> list[Stream]:
    """The streams that `train.mode` trains."""
    return [stream for stream in all_streams(config) if stream.name in config.train.streams]
