import copy
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from grit_jax.config import EmbeddingConfig, MeshConfig, TransformerConfig
from grit_jax.errors import InputError
from grit_jax.hf.config_json import read_config
from grit_jax.hf.interop import older_tokenizer
from grit_jax.hf.model_folder import open_folder, save_folder
from grit_jax.inference.model import GritModel
from grit_jax.model.pretrained import Pretrained
from grit_jax.model.transformer import abstract_model, abstract_params, bind, init_params, param_axes
from grit_jax.parallel import sharding
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer
from tests import models
from tests.hf import families

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
    return model.output_layer(jnp.dtype("float32"))(model(jnp.asarray(tokens), mask)[0])


def same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), left, right))


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
    system = [{"role": role, "content": text} for role, text in [("system", " Be kind.\n"), ("developer", " ")]]
    for begun in ([], system, system[1:]):
        text = prompts.generation([*begun, *messages], bos="<s>", eos="</s>")
        assert theirs.apply_chat_template([*begun, *messages], tokenize=False, add_generation_prompt=True) == text
    for refused in (system[:1], [*messages, *system], [*system, *messages[1:]]):
        with pytest.raises(Exception, match="system message"):
            theirs.apply_chat_template(refused, tokenize=False)
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
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; supported are llama, mistral, mixtral"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"is_causal": False}, "is_causal=False is not supported"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ({"sliding_window": 4}, "sliding_window=4 is a feature that llama does not have"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is a feature that llama does not have"),
        ({"num_local_experts": 4}, "num_local_experts=4 is a feature that llama does not have"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types are not all alike, as llama's layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types are not all alike, as llama's layers"),
        (
            {"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"] * 2},
            "layer_types are not all alike, as mistral's layers",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types has 1 entries for num_hidden_layers=2",
        ),
        ({"model_type": "mixtral", "norm_topk_prob": False}, "norm_topk_prob=False is not supported"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "experts_per_token=3 is not between 1 and num_experts=2",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window_pattern": 3}, "sliding_window_pattern=3"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is a feature"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope scaling of type 'llama3' lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8}}, "rope scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8}}, "rope scaling of type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling of type 'linear' lacks factor"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported in rope scaling of type 'default'",
        ),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}},
            r"mrope_section=\[1, 1, 2\] is not supported in rope scaling",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                },
            },
            "positions stretched in layers with a window are not supported",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2}, "layer_types has 'chunked_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(exported, changes, message):
    edit_config(exported, **changes)
    with pytest.raises(InputError, match=message):
        open_folder(exported)


def test_absent_keys_have_the_values_of_transformers():
    """Every key that a family's config class fills in, left out: the architecture is the one of the whole file."""
    transformers = pytest.importorskip("transformers")
    kept = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 4, "vocab_size": 64}
    kept |= {"intermediate_size": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    classes = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text")
    for config_class in (getattr(transformers, f"{name}Config") for name in classes):
        options = {"use_sliding_window": True, "max_window_layers": 2} if "Qwen" in config_class.__name__ else {}
        given = {**kept, **options, "model_type": config_class.model_type}
        written = config_class(**given).to_dict()
        assert read_config(given, source="short") == read_config(written, source="long")


LINEAR = {"rope_type": "linear", "factor": 2.0}
GEMMA3 = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 4}
PER_LAYER = {"full_attention": LINEAR | {"rope_theta": 5e5}, "sliding_attention": {"rope_type": "default"}}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_scaling": LINEAR},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_scaling": LINEAR | {"rope_theta": 5e5}},
        {"rope_parameters": LINEAR | {"rope_theta": 5e5}},
        {"rope_parameters": LINEAR, "rope_theta": 5e5},
        {"rope_parameters": LINEAR | {"rope_theta": 5e5}, "rope_theta": 5e5},
        {"rope_parameters": LINEAR, "rope_scaling": LINEAR},
        {"rope_parameters": LINEAR, "rope_scaling": None},
        {"rope_parameters": None, "rope_scaling": LINEAR},
        {"rope_parameters": {}, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 5e5}},
        GEMMA3 | {"rope_scaling": LINEAR, "rope_theta": 5e5, "rope_local_base_freq": 500.0},
        GEMMA3 | {"rope_parameters": PER_LAYER, "rope_local_base_freq": 500.0},
        GEMMA3 | {"rope_parameters": PER_LAYER, "rope_scaling": LINEAR | {"rope_theta": 5e5}},
    ],
)
def test_positions_are_read_as_transformers_reads_them(rope):
    transformers = pytest.importorskip("transformers")
    shape = dict(families.SHAPE, rms_norm_eps=1e-6, model_type="llama") | rope
    written = transformers.AutoConfig.for_model(**copy.deepcopy(shape)).to_dict()
    assert read_config(shape, source="short") == read_config(written, source="long")


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 4.0}},
            "rope_scaling=.* contradicts rope_para",
        ),
        (
            {"rope_parameters": LINEAR | {"rope_theta": 1e4}, "rope_theta": 5e5},
            "rope_theta=500000.0 contradicts rope_the",
        ),
        ({"rope_scaling": LINEAR | {"type": "dynamic"}}, "rope_scaling.rope_type='linear' contradicts type='dynamic'"),
        ({"rope_parameters": PER_LAYER}, "rope_parameters=.* has entries for types of layers, which are not supported"),
        (
            GEMMA3 | {"rope_parameters": LINEAR},
            "rope_parameters=.* has no entries for sliding_attention and full_atten",
        ),
        (
            GEMMA3 | {"rope_parameters": PER_LAYER, "rope_theta": 1e4},
            "rope_theta=10000.0 contradicts rope_theta=500000.0 of the rope parameters",
        ),
    ],
)
def test_positions_that_a_config_tells_twice_and_differently_are_refused(rope, message):
    shape = dict(families.SHAPE, rms_norm_eps=1e-6, model_type="llama") | rope
    with pytest.raises(InputError, match=f"^here: {message}"):
        read_config(shape, source="here")


def test_a_repeated_tied_head_is_taken_and_another_head_refused(tmp_path):
    pretrained, params = random_model()
    save_folder(tmp_path / "hf", pretrained, params)
    file = tmp_path / "hf/model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    head = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, file)
    assert same(open_folder(tmp_path / "hf").load(whole(pretrained.architecture)), params)
    head[5, 6] += 1e-3
    safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, file)
    with pytest.raises(InputError, match=r"lm_head.weight is not the embedding table, though config.json says tie_wor"):
        open_folder(tmp_path / "hf").load(whole(pretrained.architecture, mesh=MeshConfig(2, 2, 2)))


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(exported, value):
    tensors = safetensors.numpy.load_file(exported / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    safetensors.numpy.save_file(tensors, exported / "model.safetensors")
    pretrained = open_folder(exported)
    with pytest.raises(InputError, match=r"NaN or infinite values in model.layers.1.mlp.up_proj.weight; the folder"):
        pretrained.load(whole(pretrained.architecture))


@pytest.mark.parametrize("size", [0, 4, 40])
def test_a_file_that_is_hardly_there_is_refused_by_name(exported, size):
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    pretrained = open_folder(exported)
    with pytest.raises(InputError, match=r"model.safetensors: not a complete safetensors file"):
        pretrained.load(whole(pretrained.architecture))


def test_a_file_that_the_index_names_must_be_there(tmp_path):
    pretrained, params = random_model()
    save_folder(tmp_path / "hf", pretrained, params, max_shard_bytes=20_000)
    shard = sorted((tmp_path / "hf").glob("model-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(InputError, match=rf"names files that are not there: {shard.name}"):
        open_folder(tmp_path / "hf").load(whole(pretrained.architecture))


def test_the_references_own_layout_imports_without_running_its_code(exported):
    """A wrapper's prefix on every name, and custom modelling code that must not be touched."""
    pretrained = open_folder(exported)
    expected = pretrained.load(whole(pretrained.architecture))
    tensors = safetensors.numpy.load_file(exported / "model.safetensors")
    tensors = {f"model.{name}": value for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, exported / "model.safetensors")
    auto_map = {name: f"modeling_gritlm7b.Mistral{name}" for name in ("AutoModel", "AutoModelForCausalLM")}
    edit_config(exported, auto_map=auto_map)
    (exported / "modeling_gritlm7b.py").write_text("raise SystemExit('this code must not run')")
    (exported / "pytorch_model.bin").write_bytes(b"a pickle that must not be opened")
    pretrained = open_folder(exported)
    assert same(pretrained.load(whole(pretrained.architecture)), expected)


def test_weights_of_any_stored_type_become_the_type_asked_for(exported):
    pretrained = open_folder(exported)
    params = pretrained.load(whole(pretrained.architecture))
    tensors = safetensors.numpy.load_file(exported / "model.safetensors")
    for kind in ("float64", "float16", "bfloat16"):
        stored = {name: value.astype(kind) for name, value in tensors.items()}
        safetensors.numpy.save_file(stored, exported / "model.safetensors")
        rounded = jax.tree.map(lambda x, kind=kind: np.asarray(x).astype(kind).astype(np.float32), params)
        assert same(open_folder(exported).load(whole(pretrained.architecture)), rounded)
    loaded = open_folder(exported).load(whole(pretrained.architecture), jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(loaded))


def test_a_weight_too_large_for_float16_is_refused_by_name(tmp_path):
    pretrained, params = random_model()
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    with pytest.raises(InputError, match=r"model.norm.weight has values over float16's 65504"):
        save_folder(tmp_path / "hf", pretrained, params, dtype="float16")


@pytest.mark.parametrize("changes", [{"sliding_window": 4}, {"qk_norm": True}, {"family": "qwen2"}])
def test_an_architecture_that_its_family_cannot_express_is_refused(tmp_path, changes):
    pretrained, params = random_model(**changes)
    with pytest.raises(InputError, match=rf"family='{pretrained.architecture.family}' has no model.architecture."):
        save_folder(tmp_path / "hf", pretrained, params)


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


def test_a_tokenizer_with_more_entries_than_rows_loads_and_refuses_texts_that_hold_one(exported):
    tokenizer = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(exported / "tokenizer.json"))
    model = GritModel.load(exported)
    assert model.architecture.vocab_size == 258 == model.tokenizer.vocab_size
    assert model.encode("a text").shape == (32,)
    message = "text 1: '<image>' is token 258, and the model's embedding table has 258 rows; remove it from the text"
    with pytest.raises(InputError, match=message):
        model.encode(["a text", "an <image>"])
    with pytest.raises(InputError, match="'<image>' is token 258"):
        model.generate("an <image>")
    again = Tokenizer.from_files(model.tokenizer.files())  # as a checkpoint and a process that counts tokens have it
    with pytest.raises(InputError, match="'<image>' is token 258"):
        again.encode("<image>")
    assert again.fingerprint == Tokenizer.load(exported).fingerprint


def test_a_table_without_rows_for_bos_and_eos_is_refused(exported):
    edit_config(exported, vocab_size=257)
    with pytest.raises(InputError, match=r"config.json: vocab_size=257 leaves out the special token '</s>'"):
        open_folder(exported)


def test_a_vector_that_is_not_finite_is_an_error():
    model = models.make()
    row = int(model.tokenizer.encode("q").ids[0])
    model.params["embedding"] = model.params["embedding"].at[row].set(jnp.inf)
    assert np.isfinite(model.encode("a text")).all()
    with pytest.raises(InputError, match=r"text 0: its vector is not finite \(1 of 1 are not\)"):
        model.encode(["quit"])


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_files_of_an_export_are_as_readable_as_the_umask_lets_them_be(tmp_path, umask):
    before = os.umask(umask)
    try:
        pretrained, params = random_model(EmbeddingConfig(projection_dim=8))
        save_folder(tmp_path / "one", pretrained, params)
        save_folder(tmp_path / "many", pretrained, params, max_shard_bytes=20_000)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_an_exported_tokenizer_has_the_form_that_older_libraries_read(tmp_path, shared):
    """tokenizers before 0.20, and so transformers before 4.45, read merges as strings alone."""
    tokenizer = Tokenizer.load(shared / "data/models/stories260K")
    written = older_tokenizer(tokenizer.files()["tokenizer.json"])
    assert all(isinstance(merge, str) for merge in json.loads(written)["model"]["merges"])
    again = Tokenizer.from_files(tokenizer.files() | {"tokenizer.json": written})
    assert again.fingerprint == tokenizer.fingerprint
