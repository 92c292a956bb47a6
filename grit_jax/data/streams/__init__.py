"""The host's side of the streams; `grit_jax.train.objectives` has the device's."""

from __future__ import annotations

from collections.abc import Sequence

from grit_jax.config import Config
from grit_jax.data.streams.embedding import EmbeddingStream
from grit_jax.data.streams.generative import GenerativeStream
from grit_jax.data.streams.stream import Stream

STREAMS: dict[str, type[EmbeddingStream] | type[GenerativeStream]] = {
    stream.name: stream for stream in (EmbeddingStream, GenerativeStream)
}


def all_streams(config: Config) -> list[Stream]:
    """Every stream under the settings of a config."""
    return [stream(config) for stream in STREAMS.values()]


def readers(config: Config, trained: Sequence[Stream]) -> list[Stream]:
    """The trained streams, then the others: files of these are numbered too, and a resumed run needs them all."""
    names = {stream.name for stream in trained}
    return [*trained, *(stream for stream in all_streams(config) if stream.name not in names)]


def trained_streams(config: Config) -> list[Stream]:
    """The streams that `train.mode` trains."""
    return [stream for stream in all_streams(config) if stream.name in config.train.streams]
