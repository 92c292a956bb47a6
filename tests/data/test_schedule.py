import dataclasses
import hashlib
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax.config import Config, DataConfig, LossConfig, StageConfig, TrainConfig
from grit_jax.data.schedule import Schedule, same_data, validation_steps
from grit_jax.data.streams import trained_streams
from grit_jax.data.streams.generative import token_weights
from grit_jax.data.token_index import TokenIndex
from grit_jax.errors import InputError
from grit_jax.text.prompts import HASH_BITS
from tests.data.reading import read_by


def embedding_index(records, name="e.jsonl", negatives=2, seed=0, **changes):
    """A file of `records` records with one positive each; every text has 4 tokens of prefix."""
    rng = np.random.default_rng(seed)
    texts = 2 + negatives
    lengths = rng.integers(5, 30, records * texts)
    fields = {
        "text_starts": np.arange(records + 1) * texts,
        "num_positives": np.ones(records, np.int32),
        "lengths": lengths.astype(np.int32),
        "hashes": rng.integers(0, 2**60, records * texts),
        "span_starts": np.arange(records * texts + 1),
        "spans": np.stack([np.full(records * texts, 4), lengths], 1).astype(np.int32),
    }
    return TokenIndex(Path(name), "embedding", **fields | changes)


def generative_index(records, name="g.jsonl", seed=0):
    lengths = np.random.default_rng(seed).integers(6, 30, records)
    spans = np.stack([np.full(records, 4), lengths], 1)
    return TokenIndex(
        Path(name), "generative", np.arange(records + 1), np.zeros(records, np.int32), lengths.astype(np.int32),
        np.arange(records), np.arange(records + 1), spans.astype(np.int32),
    )  # fmt: skip


def schedule(*indexes, mode="embedding", loss=LossConfig(), seed=0, multiples=(1, 1), shards=1, **data):
    defaults = {"query_max_length": 32, "passage_max_length": 32, "generative_max_length": 32}
    chunks = {"embedding_chunks": multiples[0], "generative_chunks": multiples[1]}
    train = TrainConfig(mode=mode, seed=seed, **chunks)
    config = Config(data=DataConfig(**defaults | data), loss=loss, train=train)
    streams = trained_streams(config)
    return Schedule(read_by(indexes, config, streams), streams, data=config.data, train=config.train, num_shards=shards)


def validation(*indexes, data, train=TrainConfig(), shards=1):
    config = Config(data=data, train=train)
    streams = trained_streams(config)
    return validation_steps(read_by(indexes, config, streams), streams, limit=data.row_buckets, num_shards=shards)


def queries(plan):
    """(file, record) of every query of a step."""
    rows = plan["embedding"].rows
    return [(int(f), int(r)) for f, r, t in zip(rows.file, rows.record, rows.text, strict=True) if t == 0]


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, tuple):
        return all(same(a, b) for a, b in zip(left, right, strict=True))
    return np.array_equal(left, right)


def test_a_step_is_a_pure_function_of_its_number():
    def make():
        return schedule(
            embedding_index(50), generative_index(40), mode="unified", embedding_batch=8, generative_batch=6
        )

    one, other = make(), make()
    later = [other.step(k) for k in (25, 3, 11, 0)]
    assert same(tuple(later), tuple(one.step(k) for k in (25, 3, 11, 0)))


# Sizes of files and, for each, the samples that an epoch takes (None: the whole file).
FILES = st.lists(st.tuples(st.integers(1, 30), st.none() | st.integers(1, 60)), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(FILES, st.integers(1, 40), st.integers(0, 1000))
def test_every_epoch_holds_each_file_evenly_whatever_the_batch(files, batch, seed):
    indexes = [embedding_index(size, f"{number}.jsonl") for number, (size, _) in enumerate(files)]
    taken = {f"{number}.jsonl": wanted for number, (_, wanted) in enumerate(files) if wanted}
    plans = schedule(*indexes, embedding_batch=batch, seed=seed, num_samples=taken)
    epoch_sizes = [wanted or size for size, wanted in files]
    total, epochs = sum(epoch_sizes), 4
    batches = [queries(plans.step(k)) for k in range(-(-epochs * total // batch))]
    assert {len(drawn) for drawn in batches} == {batch}
    drawn = [query for queries_of_batch in batches for query in queries_of_batch]
    for epoch in range(1, epochs + 1):
        used = Counter(drawn[: epoch * total])
        for number, (size, _) in enumerate(files):
            times = [used[number, record] for record in range(size)]
            assert sum(times) == epoch * epoch_sizes[number]
            assert max(times) - min(times) <= 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 40), st.integers(0, 1000))
def test_every_conversation_is_used_once_in_each_epoch(sizes, batch, seed):
    indexes = [generative_index(size, f"{number}.jsonl") for number, size in enumerate(sizes)]
    plans = schedule(*indexes, mode="generative", generative_batch=batch, seed=seed)
    total, epochs = sum(sizes), 3
    drawn = []
    for k in range(-(-epochs * total // batch)):
        rows = plans.step(k)["generative"].rows
        drawn += zip(rows.file.tolist(), rows.record.tolist(), strict=True)
    assert all(len(set(drawn[epoch * total : (epoch + 1) * total])) == total for epoch in range(epochs))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 20), st.integers(0, 1000))
def test_no_sample_is_used_twice_before_all_are_used_once_at_any_step(sizes, batch, seed):
    files = [embedding_index(size, f"{number}.jsonl") for number, size in enumerate(sizes)]
    plans = schedule(*files, embedding_batch=batch, seed=seed)
    drawn = [query for k in range(2 * sum(sizes) // batch + 1) for query in queries(plans.step(k))]
    total = sum(sizes)
    for epoch in range(0, len(drawn) - total, total):
        assert len(set(drawn[epoch : epoch + total])) == total


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(2, 12), st.integers(0, 1000))
def test_as_many_batches_as_can_be_are_of_one_file(sizes, batch, seed):
    files = [embedding_index(size, f"{number}.jsonl") for number, size in enumerate(sizes)]
    plans = schedule(*files, embedding_batch=batch, seed=seed)
    total, epochs = sum(sizes), 3
    drawn = [queries(plans.step(k)) for k in range(epochs * total // batch)]
    alone = sum(len({file for file, _ in of_batch}) == 1 for of_batch in drawn)
    # Of each epoch a batch may lie across its border, and one of a file may be needed to complete it.
    assert alone >= epochs * sum(size // batch for size in sizes) - 2 * epochs


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 100)), min_size=2, max_size=4),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_files_are_mixed_in_the_ratio_of_their_samples(files, batch, seed):
    indexes = [generative_index(size, f"{number}.jsonl") for number, (size, _) in enumerate(files)]
    taken = {f"{number}.jsonl": wanted for number, (_, wanted) in enumerate(files)}
    plans = schedule(*indexes, mode="generative", generative_batch=batch, seed=seed, num_samples=taken)
    epoch = sum(taken.values())
    steps = 2 * epoch // batch
    used = Counter(file for k in range(steps) for file in plans.step(k)["generative"].rows.file.tolist())
    for number, (_, wanted) in enumerate(files):
        # Exact at the end of an epoch, and the last steps may be cut off.
        assert abs(used[number] - 2 * wanted) <= batch


def test_a_late_step_costs_what_an_early_one_does():
    plans = schedule(embedding_index(5000, negatives=1), embedding_batch=8)

    def seconds(first):
        started = time.process_time()
        for k in range(first, first + 20):
            plans.step(k)
        return time.process_time() - started

    seconds(0)
    assert seconds(10**6) < 5 * seconds(0) + 0.1


def stages(*, embedding=(20, 12), generative=(15, 15), **changes):
    """Two files of each stream; a curriculum of three stages."""
    files = [embedding_index(size, f"e{number}.jsonl") for number, size in enumerate(embedding)]
    files += [generative_index(size, f"g{number}.jsonl") for number, size in enumerate(generative)]
    curriculum = [
        StageConfig(5, files=["e0.jsonl", "g*"]),
        StageConfig(4, files=["e1.jsonl", "g1.jsonl"]),
        StageConfig(num_samples={"e0.jsonl": 4, "g0.jsonl": 0}),
    ]
    settings = {"mode": "unified", "embedding_batch": 4, "generative_batch": 3, "curriculum": curriculum}
    return schedule(*files, **settings | changes)


def files_of(stream):
    return set(stream.rows.file.tolist())


def test_each_stage_of_a_curriculum_has_its_own_files():
    steps = stages()
    plans = [steps.step(k) for k in range(60)]
    for embedding, generative, part in (({0}, {2, 3}, plans[:5]), ({1}, {3}, plans[5:9]), ({0, 1}, {3}, plans[9:])):
        assert set().union(*(files_of(plan["embedding"]) for plan in part)) == embedding
        assert set().union(*(files_of(plan["generative"]) for plan in part)) == generative
    used = Counter(file for plan in plans[9:] for file, _ in queries(plan))  # 51 steps of 4; an epoch has 4 + 12
    assert abs(used[1] - 3 * used[0]) <= 16


def test_a_stage_uses_every_record_once_before_any_twice():
    plans = stages()
    first = [query for k in range(5) for query in queries(plans.step(k))]
    assert len(set(first)) == 20
    second = [query for k in range(5, 8) for query in queries(plans.step(k))]
    assert len(set(second)) == 12


def test_a_step_of_a_curriculum_does_not_depend_on_earlier_ones():
    later = stages()
    earlier = stages()
    assert all(same(later.step(k), earlier.step(k)) for k in range(12))
    assert same(stages().step(9), later.step(9))


def test_the_rows_of_every_stage_are_from_the_same_buckets():
    plans = stages()
    assert len(plans.buckets["embedding"]) <= 4
    assert {plans.step(k)["embedding"].rows.num_rows for k in range(30)} <= set(plans.buckets["embedding"])


def test_the_report_names_each_stage():
    report = "\n".join(stages().summary())
    assert "embedding from step 1: 20 samples in 1 files" in report
    assert "generative from step 6: 15 samples in 1 files" in report
    assert "embedding from step 10: 16 samples in 2 files" in report


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (StageConfig(files=["e9.jsonl", "g*"]), r"data.curriculum\[0\].files names 'e9.jsonl'.*did you mean 'e"),
        (StageConfig(files=["e*"]), r"data.curriculum\[0\] has no usable generative record .*train.mode=unified"),
        (StageConfig(num_samples={"x": 1}), r"data.curriculum\[0\].num_samples names 'x', which is not a file"),
    ],
)
def test_a_stage_without_files_is_refused(stage, message):
    with pytest.raises(InputError, match=message):
        stages(curriculum=[stage])


def test_a_stage_can_take_a_file_that_an_epoch_leaves_out_otherwise():
    curriculum = [StageConfig(2, num_samples={"e0.jsonl": 0}), StageConfig()]
    plans = stages(curriculum=curriculum)
    assert files_of(plans.step(0)["embedding"]) == {1}
    assert set().union(*(files_of(plans.step(k)["embedding"]) for k in range(2, 10))) == {0, 1}


def test_full_batches_come_from_one_file_and_only_leftovers_are_mixed():
    files = [embedding_index(size, f"{size}.jsonl") for size in (40, 19, 13)]
    plans = schedule(*files, embedding_batch=8)
    mixed = sum(len({file for file, _ in queries(plans.step(k))}) > 1 for k in range(9))
    assert mixed == 9 - (40 // 8 + 19 // 8 + 13 // 8)


def test_epochs_are_shuffled_differently():
    plans = schedule(embedding_index(32), embedding_batch=8)
    first, second = ({frozenset(queries(plans.step(k))) for k in steps} for steps in (range(4), range(4, 8)))
    assert first.isdisjoint(second)


def test_num_samples_limits_a_file_and_walks_through_all_of_it():
    files = [embedding_index(20, "big.jsonl"), embedding_index(8, "small.jsonl")]
    plans = schedule(*files, embedding_batch=4, num_samples={"big.jsonl": 8})
    first_epochs = [query for k in range(8) for query in queries(plans.step(k))]
    assert Counter(file for file, _ in first_epochs[:16]) == {0: 8, 1: 8}
    assert max(Counter(query for query in first_epochs if query[0] == 0).values()) == 1


def test_num_samples_of_an_unknown_file_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"names 'smal.jsonl'.*did you mean 'small.jsonl'"):
        schedule(embedding_index(8, "small.jsonl"), num_samples={"smal.jsonl": 3})


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_groups_hold_a_positive_then_distinct_negatives_until_they_run_out(group):
    plan = schedule(embedding_index(12, negatives=3), embedding_batch=4, group_size=group).step(0)["embedding"]
    texts = list(zip(plan.rows.record, plan.rows.text, strict=True))
    for query, passages in zip(plan.query_texts, plan.passage_texts.reshape(4, group), strict=True):
        record = texts[query][0]
        assert texts[passages[0]] == (record, 1)
        negatives = [texts[passage] for passage in passages[1:]]
        assert all(owner == record and text >= 2 for owner, text in negatives)
        assert len({text for _, text in negatives}) == min(3, group - 1)


def test_positives_and_negatives_are_drawn_at_random():
    index = embedding_index(4, negatives=4, num_positives=np.full(4, 2, np.int32))  # texts 1 and 2; 3, 4 and 5
    plans = schedule(index, embedding_batch=4, group_size=2)
    drawn = Counter(text for k in range(40) for text in plans.step(k)["embedding"].rows.text.tolist())
    assert set(drawn) == {0, 1, 2, 3, 4, 5}
    assert drawn[1] + drawn[2] == drawn[3] + drawn[4] + drawn[5] == 40 * 4


def test_passages_with_nothing_to_pool_are_never_drawn():
    index = embedding_index(4, negatives=4, num_positives=np.full(4, 2, np.int32))
    starts = index.text_starts[:-1]
    index.spans[starts + 1] = index.spans[starts + 4] = [4, 4]  # one positive and one negative of each record
    plans = schedule(index, embedding_batch=4, group_size=3)
    assert {text for k in range(20) for text in plans.step(k)["embedding"].rows.text.tolist()} == {0, 2, 3, 5}


def test_queries_and_passages_are_cut_at_their_own_limits():
    index = embedding_index(12, negatives=3)
    rows = (
        schedule(index, embedding_batch=12, group_size=4, query_max_length=9, passage_max_length=17)
        .step(0)["embedding"]
        .rows
    )
    whole = index.lengths[index.text_starts[rows.record] + rows.text]
    assert whole.max() > 17
    assert np.array_equal(rows.length, np.minimum(whole, np.where(rows.text == 0, 9, 17)))


def test_a_run_made_before_fingerprints_had_a_structure_is_held_to_its_texts():
    index = embedding_index(6)
    moved = dataclasses.replace(index, num_positives=np.full(6, 2, np.int32))
    before, after = (schedule(each, embedding_batch=3).fingerprint for each in (index, moved))
    digests = hashlib.sha256(index.hashes.tobytes()).digest(), hashlib.sha256(index.lengths.tobytes()).digest()
    file = f"{hashlib.sha256(b''.join(digests)).hexdigest()[:16]} {hashlib.sha256(b'all').hexdigest()}"
    recorded = hashlib.sha256(f"2 {file}".encode()).hexdigest()[:16]  # what such a run has in its checkpoints
    assert same_data(recorded, before)
    assert not same_data(recorded[::-1], before)
    assert same_data(before, before)
    assert not same_data(before, after)


def test_data_are_the_same_where_all_parts_agree_that_were_recorded():
    assert all(same_data(recorded, "a-b-c") for recorded in ("a", "a-b", "a-b-c"))
    assert not any(same_data(recorded, "a-b-c") for recorded in ("b", "a-c", "a-b-d", "a-b-c-d", "", "a-"))


def test_a_run_is_held_to_its_tokens():
    index = dataclasses.replace(embedding_index(6), tokens=np.arange(9, dtype=np.uint8), endings=np.zeros(24, np.uint8))
    other = dataclasses.replace(index, tokens=index.tokens + np.uint8(1))
    before, after = (schedule(each, embedding_batch=3).fingerprint for each in (index, other))
    assert before.split("-")[:2] == after.split("-")[:2]
    assert not same_data(before, after)
    assert same_data(before.rpartition("-")[0], after)


def test_query_weights_of_a_step_are_a_mean():
    plan = schedule(embedding_index(12), embedding_batch=8).step(0)["embedding"]
    assert np.allclose(plan.query_weights, 1 / 8)


def test_a_record_without_negatives_leaves_filler_passages():
    plan = schedule(embedding_index(6, negatives=0), embedding_batch=4, group_size=3).step(0)["embedding"]
    assert (plan.passage_ids.reshape(4, 3)[:, 1:] == -1).all()
    assert len(set(plan.passage_ids.reshape(4, 3)[:, 0].tolist())) == 4


def test_equal_passages_share_an_id_only_when_duplicates_are_excluded():
    index = embedding_index(4, negatives=0, hashes=np.array([0, 9, 1, 9, 2, 9, 3, 8]))
    kept = schedule(index, embedding_batch=4, group_size=1).step(0)["embedding"]
    excluded = schedule(index, embedding_batch=4, group_size=1, exclude_duplicates=True).step(0)["embedding"]
    assert len(set(kept.passage_ids.tolist())) == 4
    assert sorted(Counter(excluded.passage_ids.tolist()).values()) == [1, 3]


def test_positives_of_equal_queries_are_never_each_others_negatives():
    # Query 0 has positives 9 and 8, query 1 has 8 and 7; query 2 has 6, and a text equal to query 0 as its negative.
    texts = [[0, 9, 20], [0, 8, 21], [1, 8, 22], [1, 7, 23], [2, 6, 0]]
    index = embedding_index(5, negatives=1, hashes=np.ravel(texts))
    plan = schedule(index, embedding_batch=5, group_size=2, exclude_duplicates=True).step(0)["embedding"]
    ids = {}
    for (_, record), group in zip(queries({"embedding": plan}), plan.passage_ids.reshape(5, 2), strict=True):
        ids |= dict(zip(texts[record][1:], group.tolist(), strict=True))
    assert ids[9] == ids[8] == ids[7]
    assert len({ids[text] for text in (9, 6, 20, 21, 22, 23, 0)}) == 7


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossConfig("mixed", sub_batch_samples=2), [1 / 30, 1 / 30, 1 / 18]),
        (LossConfig("mixed", sub_batch_samples=None), [1 / 24] * 3),
        (LossConfig("token"), [1 / 3] * 3),
        (LossConfig("token_mean"), [1 / 24] * 3),
    ],
)
def test_token_weights_follow_the_loss_type(loss, expected):
    # The sub-batches of two samples score 15 and 9 tokens.
    assert np.allclose(token_weights(np.array([5, 10, 9]), loss), expected)


def test_row_counts_are_multiples_from_the_buckets():
    plans = schedule(
        embedding_index(90),
        generative_index(70),
        mode="unified",
        embedding_batch=8,
        generative_batch=6,
        multiples=(4, 2),
    )
    for k in range(30):
        plan = plans.step(k)
        assert plan["embedding"].rows.num_rows in plans.buckets["embedding"]
        assert plan["generative"].rows.num_rows in plans.buckets["generative"]
        assert plan["embedding"].rows.num_rows % 4 == plan["generative"].rows.num_rows % 2 == 0
    assert len(plans.buckets["embedding"]) <= 4


def test_unusable_records_are_dropped_and_counted():
    index = embedding_index(6, negatives=0)
    index.spans[0] = [5, 5]  # query of record 0 is empty
    index.spans[2] = [40, 45]  # instruction of record 1 fills the limit
    index.lengths[2] = 45
    index.spans[5] = [4, 4]  # the only positive of record 2 is empty
    plans = schedule(index, embedding_batch=3)
    assert {record for k in range(2) for _, record in queries(plans.step(k))} == {3, 4, 5}
    report = "\n".join(plans.summary())
    assert "dropped 2 of 6 records: empty text" in report
    assert "dropped 1 of 6 records: instruction leaves no room" in report


def test_a_missing_stream_is_refused():
    with pytest.raises(InputError, match=r"no usable generative record .*train.mode=unified"):
        schedule(embedding_index(8), mode="unified")


def test_a_batch_over_an_epoch_repeats_samples_and_says_so():
    plans = schedule(embedding_index(3), embedding_batch=7)
    assert len(queries(plans.step(0))) == 7
    assert "a batch repeats samples" in "\n".join(plans.summary())


def test_validation_takes_the_first_positive_and_the_first_negatives():
    data = DataConfig(query_max_length=32, passage_max_length=32, embedding_batch=3, group_size=3)
    index = embedding_index(6, negatives=4, num_positives=np.full(6, 2, np.int32))
    for plan in validation(index, data=data, train=TrainConfig(mode="embedding")):
        assert plan["embedding"].rows.text.tolist() == [0, 1, 3, 4] * 3


def test_validation_holds_everything_once_with_unit_weights():
    data = DataConfig(
        query_max_length=32, passage_max_length=32, generative_max_length=32, embedding_batch=4, generative_batch=3
    )
    files = [embedding_index(10), generative_index(7)]
    plans = validation(*files, data=data, shards=2)
    embedding = [plan for plan in plans if "embedding" in plan]
    assert [record for plan in embedding for _, record in queries(plan)] == list(range(10))
    assert [float(plan["embedding"].query_weights.sum()) for plan in embedding] == [4, 4, 2]
    assert (embedding[-1]["embedding"].passage_ids[4:] == -1).all()
    generative = [plan["generative"] for plan in plans if "generative" in plan]
    assert [int(record) for plan in generative for record in np.sort(plan.rows.record)] == list(range(7))
    assert all((plan.token_weights == 1).all() for plan in generative)


def held_out_from(*indexes, share, mode="unified"):
    """A schedule that holds a share out; the records held out of each file, and those that 30 steps train on."""
    held = schedule(*indexes, mode=mode, held_out=share, embedding_batch=16, generative_batch=8)
    kept, trained = Counter(), set()
    for plan in held.held_out_steps():
        for part in plan.values():
            kept.update({(int(f), int(r)) for f, r in zip(part.rows.file, part.rows.record, strict=True)})
    for k in range(30):
        for stream in held.buckets:
            trained |= {(int(f), int(r)) for f, r in zip(*held.samples(k, stream), strict=True)}
    return held, kept, trained


def hashed(index, seed=1, repeats=1):
    """The index with other hashes, every `repeats` records the same."""
    records = np.random.default_rng(seed).integers(0, 1 << HASH_BITS, index.num_records)
    records = records[np.arange(len(records)) // repeats]
    hashes = np.random.default_rng(seed + 1).integers(0, 1 << HASH_BITS, len(index.lengths))
    hashes[index.text_starts[:-1]] = records
    return dataclasses.replace(index, hashes=hashes)


def test_what_is_held_out_is_evaluated_once_and_never_trained_on():
    files = [hashed(embedding_index(100)), hashed(embedding_index(60, "f.jsonl"), 3), hashed(generative_index(80), 5)]
    held, kept, trained = held_out_from(*files, share=0.1)
    assert set(kept.values()) == {1}
    assert not set(kept) & trained
    every = {(number, record) for number, file in enumerate(files) for record in range(file.num_records)}
    assert set(kept) | trained == every
    weights = [plan["embedding"].query_weights for plan in held.held_out_steps() if "embedding" in plan]
    assert sum(map(np.sum, weights)) == sum(file < 2 for file, _ in kept)
    # Batches go from one file to the next, so that a few records of each fill as few of them as can be.
    assert len(weights) == -(-sum(file < 2 for file, _ in kept) // 16)
    assert any("records held out, never trained on" in line for line in held.summary())


def test_what_is_held_out_is_about_the_share_that_is_asked_for():
    _, kept, _ = held_out_from(hashed(embedding_index(20_000, negatives=0)), share=0.05, mode="embedding")
    assert abs(len(kept) / 20_000 - 0.05) < 0.005


def test_records_that_ask_the_same_are_held_out_together():
    _, kept, _ = held_out_from(hashed(embedding_index(400), repeats=4), share=0.1, mode="embedding")
    groups = Counter(record // 4 for _, record in kept)
    assert groups and set(groups.values()) == {4}


def test_a_run_with_other_records_held_out_has_other_data():
    prints = {schedule(hashed(embedding_index(100)), held_out=share).fingerprint for share in (0.0, 0.1, 0.2)}
    assert len(prints) == 3


def test_nothing_held_out_of_a_trained_stream_is_refused():
    with pytest.raises(InputError, match=r"data.held_out=1e-09 holds out none of 100 embedding records; raise it"):
        schedule(hashed(embedding_index(100)), held_out=1e-9)


def test_all_of_a_validation_file_is_evaluated_whatever_is_held_out():
    def evaluated(share):
        data = DataConfig(held_out=share, embedding_batch=8)
        train = TrainConfig(mode="embedding")
        return tuple(validation(hashed(embedding_index(50)), data=data, train=train))

    assert same(evaluated(0.5), evaluated(0.0))


def test_every_piece_of_a_batch_gets_its_share_of_the_long_rows_and_of_the_padding():
    plan = schedule(
        embedding_index(64, negatives=1), generative_index(64), mode="unified", multiples=(4, 4),
        embedding_batch=48, generative_batch=33, group_size=2,
    ).step(0)  # fmt: skip
    for rows in (plan["embedding"].rows, plan["generative"].rows):
        assert rows.num_rows % 4 == 0
        tokens = np.bincount(rows.row, rows.length, minlength=rows.num_rows).reshape(4, -1).sum(1)
        assert tokens.max() - tokens.min() <= 64  # two rows; taken in order, the last piece would be nearly empty


def test_the_files_of_a_batch_are_known_without_its_records():
    several = schedule(*(embedding_index(size, f"{size}.jsonl") for size in (3, 21, 40)), embedding_batch=4)
    alone = [several.files_of_batch(k, "embedding") for k in range(50)]
    assert alone == [sorted(set(several.samples(k, "embedding").file.tolist())) for k in range(50)]
    assert {len(files) for files in alone} == {1, 2}, "some batches are mixed"


@pytest.mark.parametrize("left_out", [[], [0], [9], [0, 1, 2, 5, 6, 9], list(range(9))])
def test_an_epoch_takes_the_usable_records_whichever_they_are(left_out):
    spans = np.array(generative_index(10).spans)
    spans[left_out, 0] = spans[left_out, 1]
    some = schedule(
        dataclasses.replace(generative_index(10), spans=spans), mode="generative", generative_batch=10 - len(left_out)
    )
    usable = sorted(set(range(10)) - set(left_out))
    assert all(sorted(some.samples(k, "generative").record.tolist()) == usable for k in range(5))
