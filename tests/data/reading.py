"""Records and files as the streams of their kinds read them."""

from grit_jax.config import Config
from grit_jax.data.index import ReadFile
from grit_jax.data.indexing import build_indexes
from grit_jax.data.streams import STREAMS, all_streams, readers


def record_prompts(record, tokenizer):
    return STREAMS[record.kind].prompts(record, tokenizer)


def build_index(path, tokenizer, **options):
    """The index of one file."""
    (file,) = build_indexes([path], tokenizer, all_streams(Config()), **options)
    return file.index


def read_by(indexes, config, trained):
    """Files with these indexes."""
    streams = {stream.record.kind: stream for stream in readers(config, trained)}
    return [ReadFile(number, index, streams[index.kind]) for number, index in enumerate(indexes)]
