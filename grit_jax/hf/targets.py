"""What an exported folder holds for tools beside transformers: sentence-transformers, older versions, readers."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import string
from collections.abc import Mapping
from typing import Any

import tokenizers

from grit_jax.config import EmbeddingConfig, TransformerConfig
from grit_jax.hf.architecture import model_class
from grit_jax.hf.hub import is_hub_id
from grit_jax.hf.names import PROJECTION
from grit_jax.text import prompts
from grit_jax.text.tokenizer import Tokenizer

REMOTE_CODE_FILE, CARD_FILE, SENTENCE_FILE = "modeling_grit.py", "README.md", "config_sentence_transformers.json"
SENTENCE_BERT_FILE, DENSE_FOLDER = "sentence_bert_config.json", "2_Dense"

# The rows of the projection, as sentence-transformers' Dense module names them.
DENSE = tuple(dataclasses.replace(row, name=row.name.replace("projection.", "linear.")) for row in PROJECTION)


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a model was made, as far as that is known; a model card says it.

    Attributes:
      base_model: What its training began with: an id on the Hub, or a name.
      licence: Of that.
      data: Names of the files it was trained on.
      step: Steps it was trained for.
      figures: What was measured at the end, by name.
    """

    base_model: str | None = None
    licence: str | None = None
    data: tuple[str, ...] = ()
    step: int | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


_POOLING_KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last_token": "pooling_mode_lasttoken",
}
# How the model card names a pooling, and how it computes it.
_POOLING_TEXTS = {
    "mean": ("mean over the text's tokens, without prompt and instruction", "hidden[start:].mean(0)"),
    "weighted_mean": (
        "mean over the text's tokens with weights 1, 2, 3 and so on",
        "(weights := torch.arange(1.0, len(hidden) - start + 1)) @ hidden[start:] / weights.sum()",
    ),
    "cls": ("hidden state of the first token", "hidden[0]"),
    "last_token": ("hidden state of the last token", "hidden[-1]"),
}
_REMOTE_FAMILIES = ("llama", "mistral", "mixtral", "qwen2")
# The pieces by which vLLM's GritLM class finds the end of the instruction.
_GRITLM_PIECES = ("<s>", "▁<", "<", "|", "embed", ">", "<0x0A>", "user")


def has_sentence_pooling(embedding: EmbeddingConfig) -> bool:
    """Whether sentence-transformers has this pooling; its weighted mean counts from the start of the prompt."""
    return embedding.pooling in _POOLING_KEYS


def loses_window(architecture: TransformerConfig, embedding: EmbeddingConfig) -> bool:
    """Whether our embedding pass sees past a sliding window that transformers keeps."""
    ignored = architecture.sliding_window is not None and not architecture.window_bidirectional
    return ignored and embedding.attention == "bidirectional"


def max_embedding_length(architecture: TransformerConfig, embedding: EmbeddingConfig) -> int:
    """Tokens up to which transformers' embedding pass equals ours; bidirectional, its window reaches W tokens away."""
    if not loses_window(architecture, embedding):
        return architecture.max_length
    return min(architecture.max_length, (architecture.sliding_window or 0) + 1)


def prompt_texts(instructions: Mapping[str, str]) -> dict[str, str]:
    """The named prompts of the folder, without the BOS that its tokenizer adds."""
    named = {"query": "", "document": ""} | dict(instructions)
    return {name: prompts.embedding("", instruction, bos="").text for name, instruction in named.items()}


def sentence_files(
    architecture: TransformerConfig, embedding: EmbeddingConfig, instructions: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON files of sentence-transformers by name, in the keys that versions from 5.4 on read; see section headers.

    Empty where it does not have the model's pooling.
    """
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
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(modules)
    ]
    files[SENTENCE_BERT_FILE] = {"max_seq_length": max_embedding_length(architecture, embedding)}
    if embedding.attention == "bidirectional":
        files[SENTENCE_BERT_FILE]["config_args"] = {"is_causal": False}
    files["1_Pooling/config.json"] = {
        "word_embedding_dimension": architecture.embed_dim,
        **{key: pooling == embedding.pooling for pooling, key in _POOLING_KEYS.items()},
        # The first token of a prompt is part of the prompt.
        "include_prompt": embedding.pooling == "cls",
    }
    files[SENTENCE_FILE] = {
        "prompts": prompt_texts(instructions),
        "default_prompt_name": "document",
        "similarity_fn_name": "cosine",
    }
    return files


def remote_code(architecture: TransformerConfig) -> tuple[dict[str, str], str] | None:
    """`auto_map` and the code of `modeling_grit.py`; None where its mask is not this model's.

    It has no windows in the bidirectional pass.
    """
    windowed = architecture.windowed_layers or (architecture.sliding_window and architecture.window_bidirectional)
    if architecture.family not in _REMOTE_FAMILIES or windowed:
        return None
    family = model_class(architecture).removesuffix("ForCausalLM")
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
    origin: Origin = Origin(),
) -> str:
    """The folder's README.md: what the model is and how each tool uses it."""
    bidirectional, family = embedding.attention == "bidirectional", architecture.family
    sentence, remote = has_sentence_pooling(embedding), remote_code(architecture) is not None
    limit = max_embedding_length(architecture, embedding)
    reference_shaped = bidirectional and embedding.projection_dim is None
    blocks = {
        "licence": origin.licence is not None,
        "hub_base": is_hub_id(origin.base_model or ""),
        "origin": origin != Origin(),
        "base": origin.base_model is not None,
        "step": origin.step is not None,
        "data": bool(origin.data),
        "figures": bool(origin.figures),
        "sentence": sentence,
        "no_sentence": not sentence,
        "projection": embedding.projection_dim is not None,
        "normalized": embedding.normalized,
        "bidirectional": bidirectional,
        "window": loses_window(architecture, embedding),
        "gemma2": family == "gemma2",
        "remote": remote and bidirectional,
        "no_remote": not remote and bidirectional,
        "byte_level": sentence and _is_byte_level(tokenizer),
        "caps": sentence and limit < architecture.max_length,
        "vllm_old": reference_shaped and embedding.pooling == "mean" and _fits_gritlm_class(family, tokenizer),
        "vllm_honours": not bidirectional or family not in ("mixtral", "gemma2"),
        "vllm_ignores": bidirectional and family in ("mixtral", "gemma2"),
        "gritlm": reference_shaped and remote and embedding.pooling == "mean",
    }
    pooling, pooled = _POOLING_TEXTS[embedding.pooling]
    eager = 'attn_implementation="eager"'
    values = {
        "licence": json.dumps(origin.licence),
        "base": origin.base_model,
        "step": f"{origin.step:,}" if origin.step is not None else "",
        "data": ", ".join(f"`{file}`" for file in origin.data),
        "figures": "\n".join(f"| `{figure}` | {value:.4g} |" for figure, value in origin.figures.items()),
        "ending": f" - {tokenizer.num_ending}" if tokenizer.ending else "",
        "name": name,
        "family": family,
        "attention": embedding.attention,
        "pooling": pooling,
        "width": embedding.projection_dim or architecture.embed_dim,
        "length": "of unit length" if embedding.normalized else "not normalised",
        "bos": " ".join(
            [
                f"The tokenizer puts `{tokenizer.bos}` in front."
                if tokenizer.bos
                else "The model has no first token of its own.",
                *([f"It ends every text with `{tokenizer.ending}`."] if tokenizer.ending else []),
            ]
        ),
        "eager": f", {eager}" if family == "gemma2" else "",
        "sentence_eager": ', model_kwargs={"attn_implementation": "eager"}' if family == "gemma2" else "",
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
    """The tokenizer.json of a tokenizer, with merges as strings: tokenizers before 0.20 know no other form."""
    values = json.loads(content)
    merges = values["model"].get("merges") or []
    if all(isinstance(pair, list) and not any(" " in piece for piece in pair) for pair in merges):
        values["model"] |= {"merges": [" ".join(pair) for pair in merges]} if merges else {}
    return json.dumps(values, ensure_ascii=False)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return '"ByteLevel"' in json.dumps(json.loads(tokenizer.files()["tokenizer.json"])["pre_tokenizer"])


def _fits_gritlm_class(family: str, tokenizer: Tokenizer) -> bool:
    """Whether vLLM's GritLM class finds the end of the instruction."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.files()["tokenizer.json"])
    return family in ("llama", "mistral") and all(backend.token_to_id(piece) is not None for piece in _GRITLM_PIECES)


def _template(name: str) -> str:
    return importlib.resources.files("grit_jax.hf").joinpath("templates", f"{name}.txt").read_text(encoding="utf-8")


def _render(template: str, blocks: Mapping[str, bool], values: Mapping[str, Any]) -> str:
    """Fills in `$value`; a line `%% block` starts lines that are there if the block is, `%% all` ends them."""
    lines, kept = [], True
    for line in template.splitlines():
        if line.startswith("%% "):
            kept = line == "%% all" or blocks[line[3:]]
        elif kept:
            lines.append(line)
    return string.Template("\n".join(lines) + "\n").substitute(values)
