from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from grit_jax.data.shuffle import shuffled


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 1000))
def test_every_number_is_at_one_place(size, seed, epoch):
    assert sorted(shuffled(np.arange(size), size, seed, epoch)) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 1000), st.data())
def test_a_place_does_not_depend_on_the_others_asked_for(size, seed, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    together = shuffled(places, size, seed)
    assert ((together >= 0) & (together < size)).all()
    assert together.tolist() == [int(shuffled(places[i : i + 1], size, seed)[0]) for i in range(len(places))]


def test_a_key_may_differ_from_place_to_place():
    places, epochs = np.array([3, 3, 0]), np.array([0, 1, 2])
    alone = [int(shuffled(places[i : i + 1], 50, 7, epochs[i : i + 1])[0]) for i in range(3)]
    assert shuffled(places, 50, 7, epochs).tolist() == alone


def test_small_orders_are_equally_likely():
    orders = Counter(tuple(shuffled(np.arange(4), 4, key).tolist()) for key in range(2400))
    assert len(orders) == 24
    assert max(orders.values()) < 160  # 100 expected, six standard deviations


def test_large_orders_look_random():
    size = 200_000
    order = shuffled(np.arange(size), size, 5)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.01
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(order, shuffled(np.arange(size), size, 6))[0, 1]) < 0.01
    assert np.sum(order == np.arange(size)) < 10  # about one number stays where it was
