"""Tokens, pooled spans and scored tokens of the reference's collator."""

import json

import numpy as np
import pytest

from grit_jax.data.records import parse_record
from grit_jax.data.tokenizing import tokenize_records
from grit_jax.text.tokenizer import Tokenizer
from tests.data.reading import record_prompts
from tests.parity import golden


@pytest.fixture(scope="module")
def tokenizer(shared):
    return Tokenizer.load(shared / "golden/tokenizer")


def collate(shared, tokenizer, name):
    """Our texts of a recorded batch, in the reference's order, and what it recorded."""
    features = golden.described(shared, f"collator/{name}")["features"]
    rows = [{"query": query, "pos": passages[:1], "neg": passages[1:]} for query, passages, _ in features]
    rows += [{"text": conversation} for _, _, conversation in features]
    records = [parse_record(json.dumps(row), f"{name}:{number}") for number, row in enumerate(rows, 1)]
    texts = tokenize_records(records, record_prompts, tokenizer)
    embedding, generative = texts[: len(features)], texts[len(features) :]
    ours = {
        "query": [texts[0] for texts in embedding],
        "passage": [text for texts in embedding for text in texts[1:]],
        "generative": [texts[0] for texts in generative],
    }
    return ours, golden.tensors(shared, f"collator/{name}")


def recorded_tokens(recorded, kind, row):
    real = recorded[f"{kind}.attention_mask"][row] == 1
    return recorded[f"{kind}.input_ids"][row][real]


@pytest.mark.parametrize("name", ["instruct", "instruct_b"])
@pytest.mark.parametrize("kind", ["query", "passage"])
def test_embedding_tokens_and_spans(shared, tokenizer, name, kind):
    ours, recorded = collate(shared, tokenizer, name)
    assert len(ours[kind]) == len(recorded[f"{kind}.input_ids"])
    for row, text in enumerate(ours[kind]):
        expected = recorded_tokens(recorded, kind, row)
        assert np.array_equal(text.tokens[:96], expected)
        assert text.spans[0, 0] == recorded[f"{kind}.instruction_lens"][row]
        assert min(text.spans[0, 1], 96) == len(expected)


def scored(labels):
    return np.flatnonzero(labels != -100)


@pytest.mark.parametrize("name", ["instruct", "instruct_b"])
def test_scored_tokens(shared, tokenizer, name):
    """One turn: the same. Several: the reference tokenizes each turn alone and adds up the lengths, so that its later
    turns begin one to three tokens early, in the assistant's marker, and its first may end one off. Ours come from
    character offsets in the whole text."""
    ours, recorded = collate(shared, tokenizer, name)
    drifted = 0
    for row, text in enumerate(ours["generative"]):
        assert np.array_equal(text.tokens[:160], recorded_tokens(recorded, "generative", row))
        mine = np.concatenate([np.arange(start, end) for start, end in text.spans])
        mine, theirs = mine[mine < 160], np.flatnonzero(recorded["generative.labels"][row] != -100)
        if len(text.spans) == 1:
            assert np.array_equal(mine, theirs)
            continue
        (first, end), (second, _) = text.spans[:2]
        assert theirs[0] == first
        begin = theirs[theirs > end][0]
        assert second - 3 <= begin < second
        assert "|>" in tokenizer.decode(text.tokens[begin - 3 : second])  # the end of <|assistant|>
        drifted += 1
    assert drifted


def test_plain_texts(shared, tokenizer):
    """Without an instruction ours begin with BOS and, for embedding, the marker, as every text does in use; the
    reference trains on the bare string. All of the text is pooled or scored in both."""
    ours, recorded = collate(shared, tokenizer, "plain")
    for kind, marker in (("query", "<|embed|>\n"), ("passage", "<|embed|>\n"), ("generative", "")):
        for row, text in enumerate(ours[kind]):
            theirs = recorded_tokens(recorded, kind, row)
            start = text.spans[0, 0]
            assert text.tokens[0] == tokenizer.bos_id != theirs[0]
            assert tokenizer.decode(text.tokens[:start]).strip() == marker.strip()
            # The first word's pieces differ: a text begins with a space in this tokenizer, after a marker it has none.
            length = min(len(theirs), len(text.tokens[start:])) - 8
            assert np.array_equal(text.tokens[start:][-length:], theirs[-length:]) or len(theirs) in (96, 160)
