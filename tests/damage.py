"""Values that no file of settings should have, and random damage done with them."""

import copy
import json

IMPOSSIBLE = [
    None, True, False, 0, 1, -1, 3, 8, 10**12, 2**31, 2**63, 10**4000, 0.0, -0.0, 0.5, 2.0, -1e-6, 1e-320, 1e300,
    float("nan"), float("inf"), float("-inf"), "", "8", "1e-5", "nan", "linear", "llama3", "\ud800", "é" * 200,
    [], [1], [None], ["full_attention"], ["sliding_attention"] * 3, [[[[]]]], {},
    {"rope_type": "linear", "factor": 2.0}, {"rope_theta": 500.0}, {"full_attention": {"rope_type": "default"}},
    {"type": "yarn", "factor": 2.0}, {"a": {"b": []}},
]  # fmt: skip

ODD_KEYS = ["", "two\nlines", "k" * 5000, "\ud800", "é", "a.b"]


def mutate(rng, values, spare=()):
    """A copy of a nested object in which one to three entries are replaced, removed, moved or added.

    `spare` are further keys that may be added, beside odd ones.
    """
    values = copy.deepcopy(values)
    for _ in range(rng.randint(1, 3)):
        place, key = _place(rng, values)
        action = rng.random()
        if action < 0.6 and key is not None:
            place[key] = copy.deepcopy(rng.choice(IMPOSSIBLE))
        elif action < 0.75 and key is not None:
            del place[key]
        elif action < 0.85 and isinstance(place, dict) and len(place) > 1:
            left, right = rng.sample(sorted(place, key=str), 2)
            place[left], place[right] = place[right], place[left]
        elif isinstance(place, dict):
            place[rng.choice([*spare, *ODD_KEYS])] = copy.deepcopy(rng.choice(IMPOSSIBLE))
    return values


def _place(rng, values):
    """A container somewhere in `values` and one of its keys, None where it has none."""
    while True:
        keys = sorted(values, key=str) if isinstance(values, dict) else list(range(len(values)))
        if not keys:
            return values, None
        key = rng.choice(keys)
        if not isinstance(values[key], dict | list) or rng.random() < 0.3:
            return values, key
        values = values[key]


def damage_bytes(rng, content):
    """A copy of a file with a piece cut out, doubled, overwritten or replaced by deep nesting."""
    start = rng.randrange(len(content) + 1)
    stop = min(len(content), start + rng.randrange(1, 40))
    middle = rng.choice(
        [b"", content[start:stop] * 2, rng.randbytes(stop - start), b"[" * 100_000, b"\xff\xfe", b"null"]
    )
    return content[:start] + middle + content[stop:]


def text(values):
    """JSON as lenient writers make it: NaN and infinities stay."""
    return json.dumps(values)
