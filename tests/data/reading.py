"""Records and files as the streams of their kinds read them."""

from grit_jax.config import Config
from grit_jax.data import indexing
from grit_jax.data.index import ReadFile
from grit_jax.data.shards import Reading
from grit_jax.data.streams import STREAMS, all_streams, readers


def record_prompts(record, tokenizer):
    return STREAMS[record.kind].prompts(record, tokenizer)


def build_indexes(paths, tokenizer, **options):
    """The indexes of files."""
    return [file.index for file in indexing.build_indexes(paths, tokenizer, all_streams(Config()), **options)]


def build_index(path, tokenizer, **options):
    """The index of one file."""
    (index,) = build_indexes([path], tokenizer, **options)
    return index


def reading(source):
    """A file and the stream that reads it."""
    return Reading(source, STREAMS[source.kind.kind](Config()))


def read_by(indexes, config, trained):
    """Files with these indexes."""
    streams = {stream.record.kind: stream for stream in readers(config, trained)}
    return [ReadFile(number, index, streams[index.kind]) for number, index in enumerate(indexes)]
