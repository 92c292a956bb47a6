"""Records and files as the streams of their kinds read them."""

from grit_jax.config import Config
from grit_jax.data import index_builder
from grit_jax.data.streams import STREAMS, all_streams, readers
from grit_jax.data.token_index import IndexedFile
from grit_jax.data.tokenizing import Reading


def record_prompts(record, tokenizer):
    return STREAMS[record.name].prompts(record, tokenizer)


def build_indexes(paths, tokenizer, **options):
    """The indexes of files."""
    return [file.index for file in index_builder.build_indexes(paths, tokenizer, all_streams(Config()), **options)]


def build_index(path, tokenizer, **options):
    """The index of one file."""
    (index,) = build_indexes([path], tokenizer, **options)
    return index


def reading(source):
    """A file and the stream that reads it."""
    return Reading(source, STREAMS[source.record_type.name](Config()))


def read_by(indexes, config, trained):
    """Files with these indexes."""
    streams = {stream.record.name: stream for stream in readers(config, trained)}
    return [IndexedFile(number, index, streams[index.record_name]) for number, index in enumerate(indexes)]
