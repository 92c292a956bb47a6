import json
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from grit_jax.config import Config, DataConfig, EmbeddingConfig, LossConfig, ModelConfig, TrainConfig
from grit_jax.data.batch import ONE_HOST, HostShare, max_segments
from grit_jax.data.index_builder import build_indexes
from grit_jax.data.pipeline import Pipeline, planned_rows
from grit_jax.data.schedule import Schedule
from grit_jax.data.sources import find_files, open_source
from grit_jax.data.streams import trained_streams
from grit_jax.data.streams.embedding import pool_weights
from grit_jax.data.tokenizing import tokenize_records
from grit_jax.errors import InputError
from grit_jax.files import UnreachableError
from grit_jax.text.tokenizer import Tokenizer
from tests.data.reading import record_prompts
from tests.data.test_sources import write

FOUR_SHARDS = HostShare((0, 1, 2, 3), 4)  # of a single host
BYTES = Tokenizer.load("bytes")
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def words():
        return " ".join("".join(rng.choice(list("abcdé"), rng.integers(1, 9))) for _ in range(rng.integers(1, 6)))

    for name in ("a", "b"):
        rows = [{"query": ["find", words()], "pos": [["", words()]], "neg": [["", words()]]} for _ in range(13)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"text": [words(), words(), words(), words()]} for _ in range(17)]
    (folder / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(path):
    return map(json.loads, path.read_text().splitlines())


def make(folder, *, share=FOUR_SHARDS, pooling="mean", loss=LossConfig("token_mean"), mode="unified", **data):
    limits = {"query_max_length": 64, "passage_max_length": 64, "generative_max_length": 128}
    config = Config(
        model=ModelConfig(embedding=EmbeddingConfig(pooling=pooling)),
        data=DataConfig(train=str(folder), **limits | {"embedding_batch": 4, "generative_batch": 3} | data),
        loss=loss,
        train=TrainConfig(steps=STEPS, mode=mode),
    )
    return Pipeline(config, BYTES, trained_streams(config), host_share=share)


def batches(pipeline, start=0):
    return map(pipeline.batch, range(start, STEPS))


def same(left, right):
    return left.keys() == right.keys() and all(
        np.array_equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )


def texts(stream):
    """Decoded texts of a batch by slot."""
    found = {}
    for row in range(len(stream.tokens)):
        for segment in range(1, stream.segment_ids[row].max() + 1):
            where = stream.segment_ids[row] == segment
            assert stream.positions[row][where].tolist() == list(range(where.sum()))
            slot = row * max_segments(stream.tokens.shape[1]) + segment - 1
            found[slot] = BYTES.decode(stream.tokens[row][where], skip_special_tokens=False)
    return found


@pytest.mark.parametrize("shards", [1, 4])
def test_slots_hold_the_formatted_queries_and_passages(folder, shards):
    lines = {row["query"][1]: row for name in "ab" for row in rows_of(folder / f"{name}.jsonl")}
    for batch in batches(make(folder, share=HostShare(tuple(range(shards)), shards))):
        found = texts(batch["embedding"])
        for query, passages in zip(
            batch["embedding"].query_slots, batch["embedding"].passage_slots.reshape(-1, 2), strict=True
        ):
            text = found[query].removeprefix("<s><|user|>\nfind\n<|embed|>\n")
            assert found[passages[0]] == "<s><|embed|>\n" + lines[text]["pos"][0][1]
            assert found[passages[1]] == "<s><|embed|>\n" + lines[text]["neg"][0][1]


def test_pooled_tokens_are_the_texts_and_nothing_else(folder):
    batch = make(folder).batch(0)["embedding"]
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            where = batch.segment_ids[row] == segment
            weights = batch.pool_weights[row][where]
            text = BYTES.decode(batch.tokens[row][where], skip_special_tokens=False)
            pooled = BYTES.decode(batch.tokens[row][where][weights > 0])
            assert text.rpartition("<|embed|>\n")[2] == pooled
            assert np.isclose(weights.sum(), 1)


def test_targets_follow_and_exactly_the_answers_are_scored(folder):
    answers = {turn for row in rows_of(folder / "g.jsonl") for turn in row["text"][1::2]}
    for batch in batches(make(folder)):
        rows = batch["generative"]
        assert np.isclose(rows.loss_weights.sum(), 1)
        for row in range(len(rows.tokens)):
            inside = np.flatnonzero(
                (rows.segment_ids[row][1:] == rows.segment_ids[row][:-1]) & (rows.segment_ids[row][1:] > 0)
            )
            assert np.array_equal(rows.targets[row][inside], rows.tokens[row][inside + 1])
            assert not np.delete(rows.targets[row], inside).any()
            scored = BYTES.decode(rows.targets[row][rows.loss_weights[row] > 0], skip_special_tokens=False)
            assert all(answer in answers for answer in scored.split("</s>")[:-1])


def test_each_conversation_carries_its_own_weight(folder):
    # With sub-batches of one sample, the scored tokens of each of the three weigh a third in all.
    for batch in batches(make(folder, loss=LossConfig("mixed", sub_batch_samples=1))):
        rows = batch["generative"]
        sums = [
            rows.loss_weights[row][rows.segment_ids[row] == segment].sum()
            for row in range(len(rows.tokens))
            for segment in range(1, rows.segment_ids[row].max() + 1)
        ]
        assert np.allclose(sums, 1 / 3)
        assert len(sums) == 3


def test_packed_and_single_rows_hold_the_same_texts_and_weights(folder):
    for packed, single in zip(batches(make(folder)), batches(make(folder, packing=False)), strict=True):
        assert single["generative"].segment_ids.max() == 1
        assert sorted(texts(packed["embedding"]).values()) == sorted(texts(single["embedding"]).values())
        for left, right in (
            (packed["embedding"].pool_weights, single["embedding"].pool_weights),
            (packed["generative"].loss_weights, single["generative"].loss_weights),
        ):
            assert np.allclose(np.sort(left[left > 0]), np.sort(right[right > 0]))


def check_hosts(whole, parts, shares):
    """That each host holds its rows of the batch of one host."""
    for step, batch in enumerate(whole):
        for stream, arrays in batch.items():
            for field, expected in arrays._asdict().items():
                for part, share in zip(parts, shares, strict=True):
                    # Rows are split, slots, weights and ids of texts are everyone's.
                    own = expected[share.rows(len(expected))] if expected.ndim == 2 else expected
                    assert np.array_equal(getattr(part[step][stream], field), own)


# Shards of each host: next to each other, in turn as on a pod, and the same ones on several hosts.
SHARES = [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(1,), (0,), (3,), (2,)], [(0, 3), (0, 3), (1, 2), (1, 2)]]


@pytest.mark.parametrize("shards", SHARES)
def test_hosts_together_hold_the_batch_of_one_host(folder, shards):
    shares = [HostShare(own, 4) for own in shards]
    parts = [list(batches(make(folder, share=share))) for share in shares]
    check_hosts(list(batches(make(folder))), parts, shares)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(SHARES), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans(),
    st.dictionaries(st.sampled_from(["a.jsonl", "g.jsonl"]), st.integers(1, 20)),
)  # fmt: skip
def test_hosts_share_the_batches_of_any_settings(folder, shards, queries, conversations, group, packing, taken):
    data = {
        "embedding_batch": queries, "generative_batch": conversations, "group_size": group, "packing": packing,
        "num_samples": taken,
    }  # fmt: skip
    shares = [HostShare(own, 4) for own in shards]
    parts = [list(batches(make(folder, share=share, **data), 3)) for share in shares]
    check_hosts(list(batches(make(folder, **data), 3)), parts, shares)


def test_skipped_records_are_in_no_batch(folder, tmp_path):
    for name in "abg":
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(["{", *lines[:4], "[]", *lines[4:], '{"text": 1}']))
    with pytest.raises(InputError, match=r"a.jsonl:1: not valid JSON"):
        make(tmp_path)
    pipeline = make(tmp_path, skip_bad=True)
    assert "skipped 1 of 16 records: not an object" in "\n".join(pipeline.summary())
    assert all(same(a, b) for a, b in zip(batches(pipeline), batches(make(folder)), strict=True))


def test_every_format_gives_the_same_batches(folder, tmp_path):
    for number, suffix in enumerate((".jsonl.gz", ".jsonl.zst", ".array_record")):
        other = tmp_path / str(number)
        other.mkdir()
        for name in "abg":
            write(other / f"{name}{suffix}", (folder / f"{name}.jsonl").read_text())
        assert all(same(a, b) for a, b in zip(batches(make(other)), batches(make(folder)), strict=True))


def test_a_later_start_changes_nothing(folder):
    plain = list(batches(make(folder)))
    assert len(plain) == 6
    assert all(same(a, b) for a, b in zip(batches(make(folder), 4), plain[4:], strict=True))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [0, 0, 1 / 3, 1 / 3, 1 / 3]),
        ("weighted_mean", [0, 0, 1 / 6, 2 / 6, 3 / 6]),
        ("last_token", [0, 0, 0, 0, 1]),
        ("cls", [1, 0, 0, 0, 0]),
    ],
)
def test_pool_weights_of_a_text_cut_at_five_tokens(pooling, expected):
    assert np.allclose(pool_weights(np.array([[2, 9]]), 5, pooling), expected)


@pytest.mark.parametrize("mode", ["embedding", "generative"])
def test_a_stream_that_is_trained_alone_has_the_batches_that_it_has_beside_the_other(folder, mode):
    both, alone = list(batches(make(folder))), list(batches(make(folder, mode=mode)))
    assert len(both) == len(alone) == 6
    for one, other in zip(both, alone, strict=True):
        assert list(other) == [mode]
        assert all(np.array_equal(a, b) for a, b in zip(one[mode], other[mode], strict=True))


CHANGES = {
    "appended": lambda path: path.write_text(path.read_text() + '{"text": ["u", "another"]}\n'),
    "rewritten": lambda path: path.write_text(path.read_text().replace("answer 3", "reply 3")),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_reads_its_index_alone_and_the_next_start_notices_a_file_that_has_changed(tmp_path, change):
    path = tmp_path / "g.jsonl"
    path.write_text("".join(json.dumps({"text": ["u", f"answer {n}"]}) + "\n" for n in range(8)))
    before, running = list(batches(make(path, mode="generative"))), make(path, mode="generative")
    CHANGES[change](path)
    assert all(same(a, b) for a, b in zip(batches(running), before, strict=True))
    if change == "removed":
        with pytest.raises(InputError, match=r"g.jsonl: no such file"):
            make(path, mode="generative")
    else:
        assert make(path, mode="generative").fingerprint != running.fingerprint


def test_damaged_tokens_are_in_no_batch_and_made_anew_at_the_next_start(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    plain = list(batches(make(tmp_path / "data")))
    (damaged,) = (tmp_path / "data/.grit_index").glob("g.jsonl-*/tokens.npy")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    with pytest.raises(UnreachableError, match=r"g.jsonl-.*: tokens of .*/g.jsonl are damaged"):
        list(batches(make(tmp_path / "data")))
    assert all(same(a, b) for a, b in zip(batches(make(tmp_path / "data")), plain, strict=True))


def with_ending():
    """A byte tokenizer that ends texts that are embedded with two tokens, which stay where they are cut."""
    backend = tokenizers.Tokenizer.from_str(BYTES.files()["tokenizer.json"])
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s> </s>", pair="<s> $A </s> $B </s>", special_tokens=special
    )
    return Tokenizer(backend, bos="<s>", eos="</s>")


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token", "cls"])
def test_rows_are_those_of_a_loop_over_texts_that_are_tokenized_and_cut_one_by_one(folder, tmp_path, pooling):
    tokenizer, share = with_ending(), HostShare((1, 2), 4)
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    paths = find_files(str(tmp_path / "data"))
    texts = [tokenize_records(list(open_source(path)), record_prompts, tokenizer) for path in paths]
    data = DataConfig(
        query_max_length=30, passage_max_length=40, generative_max_length=60, embedding_batch=9, generative_batch=7
    )
    model = ModelConfig(embedding=EmbeddingConfig(pooling=pooling))
    config = Config(model=model, data=data, loss=LossConfig("mixed"))
    streams = trained_streams(config)
    read = build_indexes(paths, tokenizer, streams)
    schedule = Schedule(read, streams, data=data, train=config.train, num_shards=4)
    indexes = {file.number: file.index for file in read}
    cut = 0
    for k in range(3):
        for stream, length in zip(streams, (40, 60), strict=True):
            name, plan = stream.name, schedule.stream_plan(k, stream.name)
            own = share.rows(plan.rows.num_rows).tolist()
            tokens, segments, positions, targets = (np.zeros((len(own), length), np.int32) for _ in range(4))
            weights = np.zeros((len(own), length), np.float32)
            for text, (file, record, which, kept, row, offset, segment) in enumerate(zip(*plan.rows[1:], strict=True)):
                if row not in own:
                    continue
                whole = texts[file][record][which]
                cut += len(whole.tokens) > kept
                row, place = own.index(row), slice(offset, offset + kept)
                tokens[row, place] = whole.cut(kept).tokens
                segments[row, place], positions[row, place] = segment, range(kept)
                if name == "generative":
                    targets[row, offset : offset + kept - 1] = whole.tokens[1:kept]
                    for start, end in np.clip(whole.spans, 1, kept):
                        weights[row, offset + start - 1 : offset + end - 1] = plan.token_weights[text]
                else:
                    start, end = whole.spans[0, 0], min(whole.spans[0, 1], kept)
                    weights[row, place] = {
                        "mean": lambda n: np.ones(n) / n,
                        "weighted_mean": lambda n: np.arange(1, n + 1) / (n * (n + 1) / 2),
                        "last_token": lambda n: np.eye(n)[-1],
                        "cls": lambda n: np.zeros(n),
                    }[pooling](end - start)[np.maximum(np.arange(kept) - start, 0)] * (np.arange(kept) >= start)
                    weights[row, offset] += pooling == "cls"
            rows = planned_rows(plan.rows, indexes, share, length)
            batch = stream.fill(plan, rows)
            expected = [tokens, segments, positions] + [weights] * (name == "embedding")
            expected += [targets, weights] * (name == "generative")
            for ours, theirs in zip(batch, expected, strict=False):
                assert ours.dtype == theirs.dtype
                assert np.array_equal(ours, theirs)
    assert cut > 20


def test_missing_training_data_is_refused():
    with pytest.raises(InputError, match=r"data.train is missing"):
        Pipeline(Config(), BYTES, trained_streams(Config()), host_share=ONE_HOST)
