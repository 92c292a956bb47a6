import pytest

from grit_jax.cli.main import main
from grit_jax.config import Config, DataConfig
from grit_jax.data.records import parse_record
from grit_jax.data.streams import all_streams
from grit_jax.datatools.sample import draw, show
from grit_jax.text.tokenizer import Tokenizer
from tests.commands import write_data
from tests.models import bytes_with_ending

BYTES = Tokenizer.load("bytes")


def shown(line, tokenizer=BYTES, **limits):
    record = parse_record(line, "f:1")
    return show(record, all_streams(Config(data=DataConfig(**limits))), tokenizer)


def test_texts_are_shown_with_special_tokens_and_what_is_pooled():
    query, positive, negative = shown('{"query": ["find", "é?"], "pos": ["p"], "neg": [["i", "n"]]}')
    assert query.pieces == [("<s><|user|>\nfind\n<|embed|>\n", False), ("é?", True)]
    assert (query.role, query.counted, query.cut) == ("query", 3, 0)
    assert positive.pieces == [("<s><|embed|>\n", False), ("p", True)]
    assert (negative.role, negative.pieces[1]) == ("negative", ("n", True))


def test_answers_are_scored_and_what_is_over_the_limit_is_cut():
    (conversation,) = shown('{"text": ["u", "a", "v", "bc"]}')
    head, answer, middle, last = conversation.pieces
    assert (answer, last) == (("a</s>", True), ("bc</s>", True))
    assert middle == ("\n<|user|>\nv\n<|assistant|>\n", False)
    (cut,) = shown('{"text": ["u", "a", "v", "bc"]}', generative_max_length=conversation.tokens - 2)
    assert cut.cut == 2
    assert cut.pieces == [head, answer, middle, ("b", True)]


def test_what_a_tokenizer_ends_texts_with_stays_where_they_are_cut():
    line, tokenizer = '{"query": ["find", "blue"], "pos": ["p"], "neg": ["n"]}', bytes_with_ending()
    whole, *_ = shown(line, tokenizer)
    assert whole.pieces[1] == ("blue</s>", True)
    query, *_ = shown(line, tokenizer, query_max_length=whole.tokens - 2)
    assert query.pieces == [whole.pieces[0], ("bl</s>", True)]
    assert (query.tokens, query.counted, query.cut) == (whole.tokens - 2, 3, 2)


def test_draws_are_repeatable_different_and_within_the_data(tmp_path):
    config = Config(data=DataConfig(train=[str(write_data(tmp_path / "data"))]))
    first, again, other = (list(draw(config, BYTES, count=6, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({where for where, _ in first}) == 6
    assert len(list(draw(config, BYTES, count=100, seed=0))) == 24


def test_the_command_marks_what_counts(tmp_path, capsys):
    folder = write_data(tmp_path / "data")
    assert main(["data", "sample", str(folder / "generative.jsonl"), "--count", "1"]) == 0
    out = capsys.readouterr().out
    assert "<s><|user|>" in out
    assert "!</s>⟧" in out
    assert "scored" in out
    with (folder / "generative.jsonl").open("w") as file:
        file.write('{"text": ["u", "a"]}\n{\n')
    assert main(["data", "sample", str(folder / "generative.jsonl"), "--count", "2"]) == 2
    assert main(["data", "sample", str(folder / "generative.jsonl"), "--count", "2", "--data.skip_bad=true"]) == 0


@pytest.mark.parametrize("length", range(1, 30))
def test_pieces_join_to_what_is_read(length):
    (text,) = shown('{"text": ["ué", "aé"]}', generative_max_length=length)
    whole = "<s><|user|>\nué\n<|assistant|>\naé</s>"
    assert whole.startswith("".join(piece.text for piece in text.pieces))
