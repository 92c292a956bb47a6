import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from grit_jax import prompts, sharding
from grit_jax.config import EmbeddingConfig, InputError, MeshConfig, TransformerConfig
from grit_jax.hf.export import save_folder
from grit_jax.hf.folder import open_folder
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import abstract_model, abstract_params, bind, init_params, param_axes
from grit_jax.tokenizer import Tokenizer

SHAPE = {"embed_dim": 32, "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
KINDS = {
    "tied llama": {},
    "untied llama": {"tie_embeddings": False},
    "mistral with a window": {"family": "mistral", "tie_embeddings": False, "sliding_window": 4},
}
TOKENS = np.random.default_rng(0).integers(0, 258, (2, 12)).astype(np.int32)


def whole(architecture, embedding=EmbeddingConfig(), mesh=MeshConfig(1, 1, 1)):
    """Shardings of every parameter on a small mesh."""
    mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    model = abstract_model(architecture, embedding.projection_dim)
    return sharding.shardings(mesh, abstract_params(model), param_axes(model))


def random_model(embedding=EmbeddingConfig(), **changes):
    architecture = TransformerConfig(**SHAPE | changes).resolve(258)
    params = init_params(architecture, jax.random.key(1), embedding.projection_dim)
    return Pretrained(architecture, embedding, Tokenizer.load("bytes"), lambda *_: params), params


def logits(architecture, params, tokens):
    model = bind(abstract_model(architecture), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = model.mask(jnp.ones_like(tokens), positions, causal=True)
    return model.output_layer(jnp.dtype("float32"))(model(jnp.asarray(tokens), mask, dtype=jnp.dtype("float32"))[0])


def same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), left, right))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_an_export_and_gives_our_logits(tmp_path, kind):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    pretrained, params = random_model(**KINDS[kind])
    save_folder(tmp_path / "hf", pretrained, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    assert np.max(np.abs(logits(pretrained.architecture, params, TOKENS) - expected)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_folder_imports_with_its_logits(tmp_path, kind):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    family = "Mistral" if "sliding_window" in KINDS[kind] else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rope_theta=5e4, tie_word_embeddings="tie_embeddings" not in KINDS[kind],
        **({"sliding_window": 4} if family == "Mistral" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, text in Tokenizer.load("bytes").files().items():
        (tmp_path / name).write_text(text)
    pretrained = open_folder(tmp_path)
    params = pretrained.load(whole(pretrained.architecture))
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    assert np.max(np.abs(logits(pretrained.architecture, params, TOKENS) - expected)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_import_of_an_export_is_bit_identical_on_any_mesh(tmp_path, kind):
    embedding = EmbeddingConfig(pooling="last_token", projection_dim=16)
    pretrained, params = random_model(embedding, **KINDS[kind])
    save_folder(tmp_path / "hf", pretrained, params, max_shard_bytes=20_000)
    again = open_folder(tmp_path / "hf")
    assert again.architecture == pretrained.architecture
    assert again.embedding == embedding
    assert again.tokenizer.fingerprint == pretrained.tokenizer.fingerprint
    assert same(again.load(whole(again.architecture, embedding)), params)
    assert same(again.load(whole(again.architecture, embedding, MeshConfig(2, 2, 2))), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_exports_hold_rounded_weights(tmp_path, dtype):
    pretrained, params = random_model()
    save_folder(tmp_path / "hf", pretrained, params, dtype=dtype)
    again = open_folder(tmp_path / "hf")
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    assert same(again.load(whole(again.architecture)), rounded)
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == dtype


def test_the_exported_tokenizer_and_chat_template_give_our_prompt(tmp_path):
    transformers = pytest.importorskip("transformers")
    pretrained, params = random_model()
    save_folder(tmp_path / "hf", pretrained, params)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [
        {"role": "user", "content": "Héllo \n"},
        {"role": "assistant", "content": " 你好 "},
        {"role": "user", "content": "again"},
    ]
    text = prompts.generation(messages, bos="<s>", eos="</s>")
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert theirs(text, add_special_tokens=False)["input_ids"] == pretrained.tokenizer.encode(text).ids.tolist()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def exported(tmp_path):
    pretrained, params = random_model(tie_embeddings=False)
    save_folder(tmp_path / "hf", pretrained, params)
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; supported are llama, mistral"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope scaling of type 'llama3'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(exported, changes, message):
    edit_config(exported, **changes)
    with pytest.raises(InputError, match=message):
        open_folder(exported)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda tensors: tensors.update({"model.extra": np.zeros(2)}), "model.extra is not a tensor of this model"),
        (
            lambda tensors: tensors.update({"lm_head.weight": np.zeros((258, 31))}),
            r"lm_head.weight has shape \(258, 31\), not \(258, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_match_are_refused_by_name(exported, change, message):
    tensors = safetensors.numpy.load_file(exported / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, exported / "model.safetensors")
    pretrained = open_folder(exported)
    with pytest.raises(InputError, match=message):
        pretrained.load(whole(pretrained.architecture))


def test_a_truncated_file_is_refused_by_name(exported):
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    pretrained = open_folder(exported)
    with pytest.raises(InputError, match=r"model.safetensors: not a complete safetensors file"):
        pretrained.load(whole(pretrained.architecture))


def test_an_export_replaces_an_export_and_nothing_else(exported, tmp_path):
    pretrained, params = random_model()
    save_folder(exported, pretrained, params)
    assert open_folder(exported).architecture.tie_embeddings
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("keep me")
    with pytest.raises(InputError, match="exists and is not an exported model"):
        save_folder(tmp_path / "notes", pretrained, params)
    assert (tmp_path / "notes/todo.txt").exists()


def test_the_real_llama_gives_its_recorded_logits(shared):
    folder = shared / "data/models/stories260K"
    recorded = json.loads((folder / "reference_output.json").read_text())
    pretrained = open_folder(folder)
    params = pretrained.load(whole(pretrained.architecture))
    ids = np.array([recorded["greedy_ids_from_bos"]], np.int32)[:, :64]
    greedy = np.argmax(logits(pretrained.architecture, params, ids)[0], axis=-1)
    assert np.array_equal(greedy[:-1], ids[0, 1:])
