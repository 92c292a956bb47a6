"""config.json with impossible values, of every family.

The oracle for each: within a second a line that begins with the file, of less than 700 characters; or the architecture
that transformers reads there, where it reads any.
"""

import contextlib
import json
import random
import time

import pytest

from grit_jax.config import jsonfile
from grit_jax.errors import InputError
from grit_jax.hf.config_json import read_config
from tests import damage
from tests.hf.families import CASES, SHAPE

transformers = pytest.importorskip("transformers")

SPARE = (
    "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "sliding_window_pattern", "num_key_value_heads", "head_dim", "num_experts",
    "original_max_position_embeddings", "tie_word_embeddings", "hidden_act", "hidden_activation", "per_layer_config",
    "partial_rotary_factor", "attention_bias", "query_pre_attn_scalar",
)  # fmt: skip
SECONDS = 1.0


def written():
    """The config.json of every family, as transformers 5 writes it and with the rotary keys of transformers 4."""
    for family, settings in CASES.values():
        name = "Gemma3Text" if family == "Gemma3" else family
        newer = getattr(transformers, f"{name}Config")(**SHAPE | settings).to_dict()
        yield newer
        older = dict(newer)
        rope = older.pop("rope_parameters")
        if name == "Gemma3Text":
            older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        older["rope_theta"] = rope["rope_theta"]
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        yield older


def check_configs(number):
    rng = random.Random(0)
    configs = list(written())
    refused = 0
    for trial in range(number):
        content = damage.text(damage.mutate(rng, rng.choice(configs), SPARE)).encode()
        if trial % 5 == 0:
            content = damage.damage_bytes(rng, content)
        begun = time.process_time()
        try:
            ours = read_config(jsonfile.parse(content, source="here/config.json").values, source="here/config.json")
        except InputError as error:
            refused += 1
            assert str(error).startswith("here/config.json: "), content
            assert "\n" not in str(error)
            assert len(str(error)) < 700
            continue
        finally:
            assert time.process_time() - begun < SECONDS, content
        theirs = None
        with contextlib.suppress(Exception):  # what transformers refuses for another key's sake has no reading
            values = json.loads(content)
            theirs = transformers.AutoConfig.for_model(**values).to_dict()
        assert theirs is None or read_config(theirs, source="theirs") == ours, content
    assert number / 3 < refused < number


def test_a_damaged_config_is_refused_or_read_as_transformers_reads_it():
    check_configs(400)


@pytest.mark.long
def test_ten_thousand_damaged_configs_are_refused_or_read_as_transformers_reads_them():
    check_configs(10_000)
