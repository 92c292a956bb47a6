"""The files of an export for other readers: sentence-transformers, older versions of transformers, people."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import string
from collections.abc import Mapping
from typing import Any

import tokenizers

from grit_jax.config import EmbeddingConfig, TransformerConfig
from grit_jax.families import FAMILIES
from grit_jax.hf.hub import is_hub_id
from grit_jax.hf.tensors import PROJECTION
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer

REMOTE_CODE_FILE, CARD_FILE, SENTENCE_FILE = "modeling_grit.py", "README.md", "config_sentence_transformers.json"
SENTENCE_BERT_FILE, DENSE_FOLDER = "sentence_bert_config.json", "2_Dense"

# The projection, as sentence-transformers' Dense module names it.
DENSE = tuple(dataclasses.replace(row, name=row.name.replace("projection.", "linear.")) for row in PROJECTION)

# `prompts.generation` as a chat template of transformers.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set told = namespace(text='', ended=false) %}{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}"
    "{% if told.ended %}{{ raise_exception('a system message must come before all others') }}{% endif %}"
    "{% set content = message['content'] | trim %}"
    "{% if content %}{% set told.text = told.text + content + '\\n\\n' %}{% endif %}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + told.text + message['content'] + '\\n' }}"
    "{% set told.text = '' %}{% set told.ended = true %}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] | trim + eos_token + '\\n' }}"
    "{% if told.text %}{{ raise_exception('a user message must follow the system message') }}{% endif %}"
    "{% set told.ended = true %}"
    "{% else %}{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if told.text %}{{ raise_exception('a user message must follow the system message') }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a model was made, as far as known.

    Attributes:
      base_model: Id on the Hub, or name, of the model that training began with.
      licence: Its licence.
      data: Names of the training files.
      step: Training steps.
      figures: Scores at the end, by name.
      merged: For a merged model, its parts with their weights, and the method.
    """

    base_model: str | None = None
    licence: str | None = None
    data: tuple[str, ...] = ()
    step: int | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    merged: str | None = None


UNKNOWN = Origin()

_POOLING_KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last_token": "pooling_mode_lasttoken",
}
# A pooling's description and code in the model card.
_POOLING_TEXTS = {
    "mean": ("mean over the text's tokens, without prompt and instruction", "hidden[start:].mean(0)"),
    "weighted_mean": (
        "mean over the text's tokens with weights 1, 2, 3 and so on",
        "(weights := torch.arange(1.0, len(hidden) - start + 1)) @ hidden[start:] / weights.sum()",
    ),
    "cls": ("hidden state of the first token", "hidden[0]"),
    "last_token": ("hidden state of the last token", "hidden[-1]"),
}
# Tokens by which vLLM's GritLM class finds the end of the instruction.
_GRITLM_PIECES = ("<s>", "▁<", "<", "|", "embed", ">", "<0x0A>", "user")


def has_sentence_pooling(embedding: EmbeddingConfig) -> bool:
    """Whether sentence-transformers has this pooling; its weighted mean starts at the beginning of the prompt."""
    return embedding.pooling in _POOLING_KEYS


def loses_window(architecture: TransformerConfig, embedding: EmbeddingConfig) -> bool:
    """Whether our embedding pass ignores a sliding window that transformers keeps."""
    ignored = architecture.sliding_window is not None and not architecture.window_bidirectional
    return ignored and embedding.attention == "bidirectional"


def max_embedding_length(architecture: TransformerConfig, embedding: EmbeddingConfig) -> int:
    """Length up to which transformers' embedding pass equals ours; its window reaches W tokens to either side."""
    window = architecture.sliding_window if loses_window(architecture, embedding) else None
    return architecture.max_length if window is None else min(architecture.max_length, window + 1)


def prompt_texts(instructions: Mapping[str, str]) -> dict[str, str]:
    """The named prompts of the folder, without the BOS that its tokenizer adds."""
    named = {"query": "", "document": ""} | dict(instructions)
    return {name: prompts.embedding("", instruction, bos="").text for name, instruction in named.items()}


def sentence_files(
    architecture: TransformerConfig, embedding: EmbeddingConfig, instructions: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON files of sentence-transformers 5.4 and newer, by name; none if it lacks the model's pooling."""
    if not has_sentence_pooling(embedding):
        return {}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    files: dict[str, Any] = {}
    if embedding.projection_dim:
        modules.append((DENSE_FOLDER, "Dense"))
        files[f"{DENSE_FOLDER}/config.json"] = {
            "in_features": architecture.embed_dim,
            "out_features": embedding.projection_dim,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    if embedding.normalized:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    files["modules.json"] = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{module}"}
        for number, (path, module) in enumerate(modules)
    ]
    files[SENTENCE_BERT_FILE] = {"max_seq_length": max_embedding_length(architecture, embedding)}
    if embedding.attention == "bidirectional":
        files[SENTENCE_BERT_FILE]["config_args"] = {"is_causal": False}
    files["1_Pooling/config.json"] = {
        "word_embedding_dimension": architecture.embed_dim,
        **{key: pooling == embedding.pooling for pooling, key in _POOLING_KEYS.items()},
        # `cls` pools the first token, which is part of the prompt.
        "include_prompt": embedding.pooling == "cls",
    }
    files[SENTENCE_FILE] = {
        "prompts": prompt_texts(instructions),
        "default_prompt_name": "document",
        "similarity_fn_name": "cosine",
    }
    return files


def remote_code(architecture: TransformerConfig) -> tuple[dict[str, str], str] | None:
    """`auto_map` and the code of `modeling_grit.py`; None for models with a window in the bidirectional pass."""
    windowed = architecture.windowed_layers or (architecture.sliding_window and architecture.window_bidirectional)
    if windowed or not FAMILIES[architecture.family].remote_code:
        return None
    family = FAMILIES[architecture.family].model_class.removesuffix("ForCausalLM")
    module = REMOTE_CODE_FILE.removesuffix(".py")
    names = {"AutoModel": f"Grit{family}Model", "AutoModelForCausalLM": f"Grit{family}ForCausalLM"}
    code = string.Template(_template(REMOTE_CODE_FILE)).substitute(family=family)
    return {auto: f"{module}.{name}" for auto, name in names.items()}, code


def model_card(
    name: str,
    architecture: TransformerConfig,
    embedding: EmbeddingConfig,
    tokenizer: Tokenizer,
    instructions: Mapping[str, str],
    origin: Origin = UNKNOWN,
) -> str:
    """The folder's README.md: a description of the model, and how to use it in each tool."""
    bidirectional, family = embedding.attention == "bidirectional", FAMILIES[architecture.family]
    sentence, remote = has_sentence_pooling(embedding), remote_code(architecture) is not None
    limit = max_embedding_length(architecture, embedding)
    reference_shaped = bidirectional and embedding.projection_dim is None and embedding.pooling == "mean"
    vllm_embeds = not bidirectional or family.vllm_is_causal
    blocks = {
        "licence": origin.licence is not None,
        "hub_base": is_hub_id(origin.base_model or ""),
        "origin": origin != UNKNOWN,
        "base": origin.base_model is not None,
        "merged": origin.merged is not None,
        "step": origin.step is not None,
        "data": bool(origin.data),
        "figures": bool(origin.figures),
        "sentence": sentence,
        "no_sentence": not sentence,
        "projection": embedding.projection_dim is not None,
        "normalized": embedding.normalized,
        "bidirectional": bidirectional,
        "window": loses_window(architecture, embedding),
        "eager": family.eager,
        "remote": remote and bidirectional,
        "no_remote": not remote and bidirectional,
        "byte_level": sentence and _is_byte_level(tokenizer),
        "caps": sentence and limit < architecture.max_length,
        "vllm_old": reference_shaped and family.vllm_gritlm and _has_gritlm_pieces(tokenizer),
        "vllm_honours": vllm_embeds,
        "vllm_ignores": not vllm_embeds,
        "gritlm": reference_shaped and remote,
    }
    pooling, pooled = _POOLING_TEXTS[embedding.pooling]
    bos = f"The tokenizer puts `{tokenizer.bos}` in front." if tokenizer.bos else ""
    bos = bos or "The model has no first token of its own."
    values = {
        "licence": json.dumps(origin.licence),
        "base": origin.base_model,
        "merged": origin.merged,
        "step": f"{origin.step:,}" if origin.step is not None else "",
        "data": ", ".join(f"`{file}`" for file in origin.data),
        "figures": "\n".join(f"| `{figure}` | {value:.4g} |" for figure, value in origin.figures.items()),
        "ending": f" - {tokenizer.num_ending}" if tokenizer.ending else "",
        "name": name,
        "family": architecture.family,
        "attention": embedding.attention,
        "pooling": pooling,
        "width": embedding.projection_dim or architecture.embed_dim,
        "length": "of unit length" if embedding.normalized else "not normalised",
        "bos": f"{bos} It ends every text with `{tokenizer.ending}`." if tokenizer.ending else bos,
        "eager": ', attn_implementation="eager"' if family.eager else "",
        "sentence_eager": ', model_kwargs={"attn_implementation": "eager"}' if family.eager else "",
        "needs": " needs transformers 5.2 or newer" if bidirectional else "",
        "keyword": ", is_causal=False" if bidirectional else "",
        "pooled": pooled,
        "window": architecture.sliding_window,
        "limit": limit,
        "prompts": "\n".join(f"- `{key}`: `{json.dumps(text)}`" for key, text in prompt_texts(instructions).items()),
        "overrides": " --hf-overrides '{\"is_causal\": false}'" if bidirectional else "",
        "gritlm": "" if embedding.normalized else ", normalized=False",
    }
    return _render(_template(CARD_FILE), blocks, values)


def older_tokenizer(content: str) -> str:
    """A tokenizer.json with its merges as strings, which tokenizers before 0.20 need."""
    values = json.loads(content)
    merges = values["model"].get("merges") or []
    if all(isinstance(pair, list) and not any(" " in piece for piece in pair) for pair in merges):
        values["model"] |= {"merges": [" ".join(pair) for pair in merges]} if merges else {}
    return json.dumps(values, ensure_ascii=False)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return '"ByteLevel"' in json.dumps(json.loads(tokenizer.files()["tokenizer.json"])["pre_tokenizer"])


def _has_gritlm_pieces(tokenizer: Tokenizer) -> bool:
    backend = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"])
    return all(backend.token_to_id(piece) is not None for piece in _GRITLM_PIECES)


def _template(name: str) -> str:
    return importlib.resources.files("grit_jax.hf").joinpath("templates", f"{name}.txt").read_text(encoding="utf-8")


def _render(template: str, blocks: Mapping[str, bool], values: Mapping[str, Any]) -> str:
    """Fills in `$value`; keeps lines from `%% block` to the next `%%` if `blocks` has it true; `%% all` always."""
    lines, kept = [], True
    for line in template.splitlines():
        if line.startswith("%% "):
            kept = line == "%% all" or blocks[line[3:]]
        elif kept:
            lines.append(line)
    return string.Template("\n".join(lines) + "\n").substitute(values)
