import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax import GritModel
from grit_jax.config import EmbeddingConfig
from grit_jax.data.records import parse_record
from grit_jax.data.streams.embedding import EmbeddingStream
from grit_jax.errors import InputError
from grit_jax.inference.runner import one_behind
from grit_jax.model.transformer import abstract_model, bind, stack_layers
from grit_jax.text import prompts
from tests.models import make

TEXTS = [
    "short",
    "a longer text with more words in it",
    "héllo 你好 😀",
    "x",
    "the same length as none of the others",
] * 2


@pytest.fixture(scope="module")
def model():
    return make()


def test_vectors_are_float32_unit_and_in_order(model):
    vectors = model.encode(TEXTS)
    assert (vectors.dtype, vectors.shape) == (np.float32, (10, 32))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(vectors[:5], vectors[5:], atol=1e-5)


def test_batch_mates_batch_size_and_devices_change_nothing(model):
    vectors = model.encode(TEXTS)
    assert np.allclose(model.encode(TEXTS[::-1], batch_tokens=64)[::-1], vectors, atol=1e-5)
    assert np.allclose(np.concatenate([model.encode([text]) for text in TEXTS[:3]]), vectors[:3], atol=1e-5)
    assert np.allclose(make(devices=4).encode(TEXTS), vectors, atol=1e-5)


def test_results_of_a_batch_are_taken_when_the_device_has_the_next():
    for count in range(4):
        happened = []

        def batches(count=count, happened=happened):
            for number in range(count):
                happened.append(f"given {number}")
                yield number

        for number in one_behind(batches()):
            happened.append(f"taken {number}")
        assert [event for event in happened if "taken" in event] == [f"taken {number}" for number in range(count)]
        for number in range(count - 1):
            assert happened.index(f"given {number + 1}") < happened.index(f"taken {number}")


def test_a_vector_is_the_mean_of_the_texts_bidirectional_hidden_states(model):
    prompt = prompts.embedding(TEXTS[1], "find", bos="<s>")
    (tokenized,) = prompts.tokenize([prompt], model.tokenizer)
    bound = bind(abstract_model(model.architecture), model.params)
    tokens = jnp.asarray(tokenized.tokens)[None]
    positions = jnp.arange(tokens.shape[1])[None]
    mask = bound.mask(jnp.ones_like(tokens), positions, causal=False)
    hidden, _ = bound(tokens, mask)
    mean = hidden[0, tokenized.spans[0, 0] :].mean(axis=0)
    assert np.allclose(model.encode([TEXTS[1]], instruction="find")[0], mean / jnp.linalg.norm(mean), atol=1e-5)


def test_the_instruction_changes_the_vector(model):
    assert not np.allclose(model.encode(TEXTS[:1]), model.encode(TEXTS[:1], instruction="find"), atol=1e-3)


def test_long_texts_are_cut_and_counted(model):
    encoded = model.encode_with_counts(["abc" * 100, "short"], max_length=40)
    assert (encoded.num_truncated, encoded.num_tokens) == (1, 40 + len("|<|embed|>\nshort"))
    assert np.allclose(encoded.vectors[0], model.encode(["abc" * 100 + "d"], max_length=40)[0], atol=1e-5)


def test_unpoolable_texts_are_refused_by_place(model):
    with pytest.raises(InputError, match="text 1 is empty"):
        model.encode(["a", ""])
    with pytest.raises(InputError, match=r"text 0: its instruction takes \d+ of 20 tokens and leaves no room"):
        model.encode(["a"], instruction="a long instruction", max_length=20)
    assert model.encode([]).shape == (0, 32)


def test_a_fingerprint_tells_weights_and_rounded_it_is_that_of_every_type_and_mesh(model):
    rounded = make()
    rounded.runner.params = stack_layers(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    assert model.fingerprint() == make(devices=4).fingerprint() != rounded.fingerprint()
    assert model.fingerprint(rounded=True) == make(devices=4).fingerprint(rounded=True)
    assert model.fingerprint(rounded=True) == rounded.fingerprint(rounded=True)
    assert model.fingerprint(rounded=True) != make(seed=1).fingerprint(rounded=True)


def test_projection_and_raw_vectors():
    projected = make(embedding=EmbeddingConfig(projection_dim=8, normalized=False))
    vectors = projected.encode(TEXTS[:2])
    assert vectors.shape == (2, 8)
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)


def test_streamed_pieces_join_to_the_answer_and_split_no_character(model):
    options = {"max_new_tokens": 60, "temperature": 1.5, "seed": 3}
    pieces = list(model.stream("hi", **options))
    assert "".join(pieces) == model.generate("hi", **options)
    assert len(pieces) > 1


def test_batch_mates_do_not_change_an_answer_and_seeds_do(model):
    options = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 0.9}
    alone = model.generate("one", seed=1, **options)
    assert model.generate(["something else", "one", "two"], seed=1, **options)[1] == alone
    assert model.generate("one", seed=1, **options) == alone
    assert model.generate("one", seed=2, **options) != alone
    assert make(devices=4).generate("one", seed=1, **options) == alone


def test_an_answer_ends_before_a_stop_string_wherever_blocks_split_it(model):
    whole = model.generate("hi", max_new_tokens=60, temperature=1.0, seed=5)
    for start in (4, 7, 15):
        stop = whole[start : start + 3]
        expected = whole[: whole.index(stop)]
        assert model.generate("hi", max_new_tokens=60, temperature=1.0, seed=5, stop=[stop]) == expected
        assert "".join(model.stream("hi", max_new_tokens=60, temperature=1.0, seed=5, stop=[stop])) == expected


def test_max_new_tokens_is_kept_and_too_long_a_prompt_refused(model):
    assert len(model.tokenizer.encode(model.generate("hi", max_new_tokens=5, raw=True)).ids) <= 15
    with pytest.raises(InputError, match=r"over the limit of 256; shorten the prompt"):
        model.generate("hi", max_new_tokens=250)


def test_a_real_llama_writes_its_recorded_text(shared):
    folder = shared / "data/models/stories260K"
    recorded = json.loads((folder / "reference_output.json").read_text())
    model = GritModel.load(folder)
    assert model.generate("", raw=True, max_new_tokens=200) == recorded["greedy_text"]
    assert model.encode(["Once upon a time"]).shape == (1, 64)


def test_log_likelihoods_are_those_of_all_logits(model):
    contexts = ["how are you", "héllo", "how are you", "how are you", "a much longer context " * 5]
    continuations = ["fine", "你好", "a", "b", "!"]
    scored = model.log_likelihoods(contexts, continuations, prefix="well ")
    for context, continuation, value, count in zip(contexts, continuations, *scored[:2], strict=True):
        before = prompts.generation(context, bos="<s>", eos="</s>") + "well "
        whole, start = before + continuation, len(before.encode()) - len("<s>") + 1
        logits = model.logits([whole.removeprefix("<s>")])[0]
        tokens = model.tokenizer.encode(whole).ids
        log_p = np.array(jax.nn.log_softmax(logits))[np.arange(len(tokens) - 1), tokens[1:]]
        assert count == len(continuation.encode())
        assert np.isclose(value, log_p[start - 1 :].sum(), atol=1e-3)
    sharded = make(devices=4).log_likelihoods(contexts, continuations, prefix="well ", batch_tokens=64)
    assert np.allclose(sharded.values, scored.values, atol=1e-4)


def test_a_greedy_continuation_is_what_generate_writes(model):
    answer = model.generate("hi", max_new_tokens=3, raw=True)
    scored = model.log_likelihoods(["hi", "hi"], [answer, "#" + answer], raw=True)
    if len(model.tokenizer.encode(answer).ids) == 3:  # bytes that are characters
        assert scored.greedy.tolist() == [True, False]


def test_a_context_that_is_too_long_loses_its_beginning(model):
    long, rest = "x" * 100 + "y" * 300, "y" * 250
    scored = model.log_likelihoods([long, rest], ["abcde", "abcde"], raw=True)
    assert scored.num_truncated == 1
    assert np.isclose(*scored.values, atol=1e-4)
    with pytest.raises(InputError, match="has 301 tokens; a text has 2 to 256"):
        model.log_likelihoods(["x"], ["y" * 299], raw=True)
    with pytest.raises(InputError, match="continuation 0: no token starts in ''"):
        model.log_likelihoods(["x"], [""])


def test_an_answer_continues_its_prefix(model):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 2}
    alone = model.generate("one", prefix="Well,", **options)
    assert model.generate(["two", "one"], prefix=["", "Well,"], **options)[1] == alone
    assert alone == model.generate("<|user|>\none\n<|assistant|>\nWell,", raw=True, **options)


def test_one_text_gives_one_vector_and_a_list_gives_rows(model):
    assert np.array_equal(model.encode("short"), model.encode(["short"])[0])
    assert model.encode([]).shape == (0, 32)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.encode_with_counts("short"),
        lambda model: model.encode_with_caches("short"),
        lambda model: model.logits("short"),
        lambda model: model.log_likelihoods("ab", ["c", "d"]),
        lambda model: model.log_likelihoods(["a", "b"], "cd"),
    ],
)
def test_a_string_is_never_taken_for_a_list_of_its_characters(model, call):
    with pytest.raises(InputError, match=r"is one string, '\w+'; give a list of them"):
        call(model)


@pytest.mark.parametrize("instruction", ["find:", "\tfind: \n", " : find", "find\n"])
def test_an_instruction_is_read_as_training_reads_it(model, instruction):
    assert np.array_equal(model.encode(TEXTS[:2], instruction=instruction), model.encode(TEXTS[:2], instruction="find"))
    line = json.dumps({"query": [instruction, "short"], "pos": ["p"]})
    trained = EmbeddingStream.prompts(parse_record(line, "x:1"), model.tokenizer)[0]
    assert trained == prompts.embedding("short", instruction, bos="<s>")
    assert model.encode(TEXTS[:1], instruction=" :\n").tolist() == model.encode(TEXTS[:1]).tolist()


def test_one_stop_string_is_not_its_characters(model):
    whole = model.generate("say", max_new_tokens=40)
    stop = whole[20:24]
    expected = whole[: whole.index(stop)]
    assert model.generate("say", max_new_tokens=40, stop=stop) == expected != ""
    assert model.generate("say", max_new_tokens=40, stop=[stop]) == expected
    assert "".join(model.stream("say", max_new_tokens=40, stop=stop)) == expected
    assert model.generate("say", max_new_tokens=40, stop="") == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be 0 or more; it cannot be unlimited"),
        ({"temperature": -0.1}, "temperature=-0.1 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"top_p": 1.5}, "top_p=1.5 must be from 0 to 1"),
        ({"top_p": -0.1}, "top_p=-0.1 must be"),
        ({"top_p": float("nan")}, "top_p=nan must be"),
    ],
)
def test_numbers_out_of_their_range_are_refused_when_text_is_written(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate("say", **options)


@pytest.mark.parametrize("options", [{"batch_tokens": 0}, {"batch_tokens": -5}, {"max_length": 0}, {"max_length": -1}])
def test_counts_of_embedding_and_scoring_are_positive(model, options):
    ((name, value),) = options.items()
    remedy = {"batch_tokens": "to let the device decide", "max_length": "for the model's limit"}[name]
    with pytest.raises(InputError, match=f"{name}={value} must be positive; leave it out {remedy}"):
        model.encode(TEXTS, **options)
    with pytest.raises(InputError, match=f"{name}={value} must be positive; leave it out {remedy}"):
        model.encode_with_caches(TEXTS, **options)
    if name == "batch_tokens":
        with pytest.raises(InputError, match=f"{name}={value} must be positive"):
            model.log_likelihoods(["a"], ["b"], **options)


def test_a_nucleus_of_nothing_is_greedy(model):
    greedy = model.generate("say", max_new_tokens=16)
    for top_p in (0.0, 1e-30):
        assert model.generate("say", max_new_tokens=16, temperature=1.0, top_p=top_p, seed=3) == greedy
    assert model.generate("say", max_new_tokens=0) == ""


def test_a_raw_prompt_has_one_bos(model):
    for text in ("words", "", "<s", " <s>words"):
        ((with_it,), (without,)) = (model.prompt_tokens([given], raw=True) for given in (f"<s>{text}", text))
        assert with_it.tolist() == without.tolist() == model.tokenizer.encode(f"<s>{text}").ids.tolist()
    assert np.array_equal(model.logits(["<s>words"])[0], model.logits(["words"])[0])


@pytest.mark.parametrize("text", ["a\ud83d", "\udc00", b"bytes", None, 3])
def test_what_is_no_text_is_refused_by_place(model, text):
    for call in (lambda: model.encode(["good", text]), lambda: model.generate(["good", "a\ud83d"])):
        with pytest.raises(
            InputError, match=r"text 1(: \\u\w{4} is half of a surrogate pair| is .*; it must be a string)"
        ):
            call()
