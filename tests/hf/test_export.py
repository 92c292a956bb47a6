"""What an exported folder gives in transformers and sentence-transformers: our vectors and our answers."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from grit_jax.config import EmbeddingConfig
from grit_jax.hf.interop import CARD_FILE, REMOTE_CODE_FILE
from grit_jax.hf.model_folder import open_folder, save_folder
from grit_jax.inference.model import GritModel
from grit_jax.model.transformer import init_params
from grit_jax.text import prompts
from tests.hf import families
from tests.hf.test_model_folder import whole

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

INSTRUCTION, OTHER = "Find the note", "Find the reply"
TEXTS = ["x", "The ferry leaves at six.", " spaces ", "Öfen 灯塔 😀", "line one\nline two"]
TOLERANCE = 1e-5


def export(folder, family, settings, embedding=EmbeddingConfig()):
    """A random transformers model as a folder of ours, with an instruction for the named prompt `query`."""
    families.save(families.make(family, settings), folder / "theirs")
    pretrained = open_folder(folder / "theirs")
    params = pretrained.load(whole(pretrained.architecture))
    if embedding.projection_dim:
        heads = init_params(pretrained.architecture, jax.random.key(3), embedding.projection_dim)
        params["projection"] = jax.tree.map(lambda x: x + 0.1, heads["projection"])
    pretrained = dataclasses.replace(pretrained, embedding=embedding)
    save_folder(folder / "ours", pretrained, params, instructions={"query": INSTRUCTION})
    return folder / "ours"


def sentence_model(folder):
    options = {"attn_implementation": "eager"}
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs=options)


def close(theirs, ours):
    return theirs.shape == ours.shape and np.max(np.abs(theirs - ours)) < TOLERANCE


def cases(*names, long=()):
    """Parameters, of which some are for the long tests."""
    return [*names, *(pytest.param(name, marks=pytest.mark.long) for name in long)]


FAMILIES = cases("mixtral", "gemma 3", long=["llama 3", "mistral", "qwen2, windows", "qwen3", "gemma 2"])


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    return export(tmp_path_factory.mktemp("export"), *families.CASES[request.param])


def test_sentence_transformers_gives_our_vectors_with_every_prompt_in_padded_batches(exported):
    ours, theirs = GritModel.load(exported), sentence_model(exported)
    plain, instructed, other = (ours.encode(TEXTS, instruction=text) for text in ("", INSTRUCTION, OTHER))
    prompt = prompts.embedding("", OTHER, bos="").text
    for batch_size in (1, 3, len(TEXTS)):
        assert close(theirs.encode(TEXTS, batch_size=batch_size), plain)
        assert close(theirs.encode(TEXTS, batch_size=batch_size, prompt=prompt), other)
    assert close(theirs.encode(TEXTS, prompt_name="document"), plain)
    assert close(theirs.encode(TEXTS, prompt_name="query"), instructed)
    assert close(theirs.encode_document(TEXTS), plain)
    assert close(theirs.encode_query(TEXTS), instructed)
    assert not close(plain, instructed)


def test_transformers_continues_a_conversation_as_we_do(exported):
    chat = [
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Again, louder."},
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager")
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ours = GritModel.load(exported)
    assert ours.generate(chat, max_new_tokens=12) == ours.tokenizer.decode(answer.tolist())


@pytest.mark.parametrize(
    "embedding",
    [
        EmbeddingConfig(pooling="cls", projection_dim=8),
        EmbeddingConfig(pooling="last_token", normalized=False),
        EmbeddingConfig(projection_dim=8, normalized=False),
        EmbeddingConfig(attention="causal"),
    ],
    ids=["cls, projection", "last token, raw", "mean, projection, raw", "causal"],
)
def test_sentence_transformers_pools_projects_and_normalises_as_we_do(tmp_path, embedding):
    folder = export(tmp_path, *families.CASES["llama 2"], embedding)
    ours, theirs = GritModel.load(folder), sentence_model(folder)
    assert close(theirs.encode(TEXTS, prompt_name="query"), ours.encode(TEXTS, instruction=INSTRUCTION))


def test_a_pooling_that_sentence_transformers_lacks_gets_no_files_for_it(tmp_path):
    folder = export(tmp_path, *families.CASES["llama 2"], EmbeddingConfig(pooling="weighted_mean"))
    names = {path.name for path in folder.rglob("*")}
    assert not {"modules.json", "1_Pooling", "sentence_bert_config.json", "config_sentence_transformers.json"} & names
    card = (folder / CARD_FILE).read_text()
    assert "sentence-transformers has no pooling that equals this model's weighted mean" in card
    assert "SentenceTransformer(" not in card


def test_texts_are_cut_where_transformers_keeps_a_window_that_we_do_not(tmp_path):
    folder = export(tmp_path, "Mistral", {"sliding_window": 63})
    ours, theirs = GritModel.load(folder), sentence_model(folder)
    texts = [*TEXTS, "The harbour wall is repaired in the rain, stone by stone. " * 3]
    assert theirs.max_seq_length == 64
    assert close(theirs.encode(texts), ours.encode(texts, max_length=64))
    assert "Embeddings are equal up to 64 tokens" in (folder / CARD_FILE).read_text()
    theirs.max_seq_length = 200
    assert not close(theirs.encode(texts[-1:]), ours.encode(texts[-1:], max_length=200))


@pytest.mark.parametrize("case", cases("mixtral", long=["llama 2", "mistral", "qwen2"]))
def test_the_code_file_gives_the_stock_classes_from_transformers_5_2_on(tmp_path, monkeypatch, case):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    family, settings = families.CASES[case]
    folder = export(tmp_path, family, settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is getattr(transformers, f"{family}ForCausalLM")
    assert type(transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)) is type(model.model)
    assert type(model.model) is getattr(transformers, f"{family}Model")
    model.save_pretrained(tmp_path / "saved")
    stored, saved = (safetensors.numpy.load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved"))
    assert stored.keys() == saved.keys()
    assert all(np.array_equal(stored[name], saved[name]) for name in stored)


def test_the_code_file_attends_bidirectionally_in_older_transformers(tmp_path):
    """The branch for versions below 5.2, run on the installed version's classes, on a padded batch."""
    import torch

    folder = export(tmp_path, *families.CASES["mistral"])
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    namespace = {}
    exec((folder / REMOTE_CODE_FILE).read_text().replace("transformers.__version__", "'4.57.6'"), namespace)
    older = namespace["GritMistralForCausalLM"].from_pretrained(folder, attn_implementation="eager")
    assert type(older.model) is namespace["GritMistralModel"]
    tokens = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    with torch.no_grad():
        for is_causal in (True, False):
            expected, actual = (
                model.model(tokens, attention_mask=mask, is_causal=is_causal).last_hidden_state
                for model in (stock, older)
            )
            assert torch.allclose(actual[mask > 0], expected[mask > 0], atol=1e-5)


@pytest.mark.parametrize(
    ("case", "embedding"),
    [
        ("mistral", EmbeddingConfig(projection_dim=8)),
        pytest.param("gemma 2", EmbeddingConfig(pooling="last_token"), marks=pytest.mark.long),
    ],
    ids=["projection", "eager only"],
)
def test_the_programs_of_the_model_card_run_and_give_our_vectors(tmp_path, monkeypatch, case, embedding):
    folder = export(tmp_path, *families.CASES[case], embedding)
    monkeypatch.chdir(folder.parent)
    programs = re.findall(r"```python\n(.*?)```", (folder / CARD_FILE).read_text(), re.DOTALL)
    names = {}
    for program in programs:
        if "import GritLM" not in program:  # needs a version of transformers of its own
            exec(program, names)
    ours = names["model"]
    assert isinstance(ours, GritModel)
    plain = ours.encode(["A text.", "Another text."])
    assert close(names["vector"].numpy(), plain[0])
    assert close(names["documents"], plain)
    assert close(names["queries"], ours.encode(["A question?"], instruction=INSTRUCTION))
    assert close(names["instructed"], ours.encode(["A question?"], instruction="Find the answer"))
    assert close(names["vectors"], names["instructed"])


@pytest.mark.parametrize("pooling", ["last_token", "mean"])
def test_a_tokenizer_that_ends_texts_with_a_token_keeps_it_through_import_and_export(tmp_path, pooling):
    """As that of Qwen3-Embedding: no BOS, and a token after each text that is not the EOS of answers."""
    import tokenizers

    families.save(families.make("Qwen3", {"vocab_size": 259}), tmp_path / "theirs")
    file = str(tmp_path / "theirs/tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(file)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A <|endoftext|> $B <|endoftext|>", special_tokens=[("<|endoftext|>", 258)]
    )
    tokenizer.save(file)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<|endoftext|>"}
    (tmp_path / "theirs/tokenizer_config.json").write_text(json.dumps(settings))
    pretrained = open_folder(tmp_path / "theirs")
    params = pretrained.load(whole(pretrained.architecture))
    pretrained = dataclasses.replace(pretrained, embedding=EmbeddingConfig(pooling=pooling))
    save_folder(tmp_path / "ours", pretrained, params)

    ours, theirs = GritModel.load(tmp_path / "ours"), sentence_model(tmp_path / "ours")
    assert (ours.tokenizer.bos, ours.tokenizer.ending) == ("", "<|endoftext|>")
    ids = [
        transformers.AutoTokenizer.from_pretrained(tmp_path / name)("a text")["input_ids"]
        for name in ("theirs", "ours")
    ]
    assert ids[0] == ids[1] and ids[0][-1] == 258
    assert close(theirs.encode(TEXTS), ours.encode(TEXTS))
    theirs.max_seq_length = 20
    assert close(theirs.encode(TEXTS), ours.encode(TEXTS, max_length=20))
