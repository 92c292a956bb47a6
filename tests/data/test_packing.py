import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_jax.data.packing import choose_buckets, fill_rows, kept_indices, pack, round_up
from grit_jax.text.prompts import TokenizedPrompt

LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=60).map(np.array)


@given(LENGTHS, st.integers(1, 8))
def test_texts_fit_their_rows_side_by_side(lengths, most):
    packing = pack(lengths, row_length=32, max_segments=most)
    for row in range(packing.num_rows):
        members = np.flatnonzero(packing.row == row)
        order = members[np.argsort(packing.offset[members])]
        assert 1 <= len(order) <= most
        assert packing.offset[order].tolist() == [0, *np.cumsum(lengths[order])[:-1].tolist()]
        assert lengths[order].sum() <= 32
        assert packing.segment[order].tolist() == list(range(1, len(order) + 1))


@given(LENGTHS)
def test_each_text_goes_into_the_fullest_row_that_holds_it_the_longest_first(lengths):
    packing = pack(lengths, row_length=32, max_segments=32)
    left = []
    for text in np.argsort(-lengths, kind="stable"):
        fits = [space for space in left if space >= lengths[text]]
        space = min(fits, default=32)
        assert 32 - packing.offset[text] == space
        if fits:
            left.remove(space)
        left.append(space - lengths[text])
    assert packing.num_rows == len(left)


@given(LENGTHS, st.integers(1, 8))
def test_rows_hold_each_text_where_it_was_put_and_nothing_else(lengths, most):
    packing = pack(lengths, row_length=32, max_segments=most)
    texts = [100 * number + np.arange(length) for number, length in enumerate(lengths, start=1)]
    rows = fill_rows(np.concatenate(texts), lengths, packing, row_length=32)
    for text, row, offset, segment in zip(texts, *packing[1:], strict=True):
        place = row, slice(offset, offset + len(text))
        assert rows.tokens[place].tolist() == text.tolist()
        assert set(rows.segment_ids[place]) == {segment}
        assert rows.positions[place].tolist() == list(range(len(text)))
    for array in rows[:3]:
        assert array.shape == (packing.num_rows, 32)
        assert not array[rows.segment_ids == 0].any()
    assert (rows.segment_ids > 0).sum() == lengths.sum()
    assert np.array_equal(rows.spread(np.concatenate(texts)), rows.tokens)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3), st.integers(1, 25)), min_size=1, max_size=9))
def test_what_stays_of_texts_is_what_a_cut_prompt_keeps(texts):
    whole, endings, limits = np.array(texts).T
    starts, lengths = np.cumsum(whole) - whole, np.minimum(whole, limits)
    kept = np.split(kept_indices(starts, whole, lengths, endings), np.cumsum(lengths))
    for start, length, ending, limit, places in zip(starts, whole, endings, limits, kept, strict=False):
        prompt = TokenizedPrompt(start + np.arange(length), np.zeros((0, 2), np.int32), min(ending, length))
        assert places.tolist() == prompt.cut(limit).tokens.tolist()


def test_one_text_per_row_is_the_special_case():
    packing = pack(np.array([3, 9, 1]), row_length=16, max_segments=1)
    assert sorted(packing.row.tolist()) == [0, 1, 2]
    assert packing.offset.tolist() == [0, 0, 0]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40).map(np.array), st.integers(1, 8), st.integers(1, 5))
def test_buckets_hold_every_sampled_step_and_are_few_multiples(needed, multiple, limit):
    buckets = choose_buckets(needed, multiple=multiple, limit=limit)
    assert 1 <= len(buckets) <= limit
    assert list(buckets) == sorted(buckets)
    assert all(bucket % multiple == 0 for bucket in buckets)
    assert needed.max() <= buckets[-1]


def test_no_bucket_is_spent_on_less_than_five_percent_of_padding():
    assert len(choose_buckets(np.array([98, 99, 100] * 9), multiple=1, limit=4)) == 1
    assert len(choose_buckets(np.array([50, 100] * 9), multiple=1, limit=4)) == 2


@pytest.mark.parametrize(("rows", "expected"), [(1, 8), (8, 8), (9, 24), (24, 24), (25, 48), (49, 72)])
def test_rounding_takes_the_next_bucket_and_beyond_the_last_a_multiple_of_it(rows, expected):
    assert round_up(rows, (8, 24)) == expected
