"""Compares an exported folder, opened with PyTorch's tools, with this package, in float32."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grit_jax.config import EmbeddingConfig
from grit_jax.data.streams.embedding import pool_weights
from grit_jax.errors import InputError, install
from grit_jax.hf.interop import SENTENCE_BERT_FILE, SENTENCE_FILE, max_embedding_length
from grit_jax.hf.model_folder import is_folder
from grit_jax.inference.model import GritModel
from grit_jax.runs.checks import Check
from grit_jax.text import prompts

SAMPLE_TEXTS = (
    "x",
    "The ferry leaves at six, an hour before the tide turns.",
    " two spaces at both ends ",
    "Eine kurze Zeile über Brücken, Öfen und Straßen.",
    "Le boulanger ferme tôt le dimanche ; le marché, non.",
    "Кот спит на тёплой крыше.",
    "灯塔每隔十秒闪一次。",
    "البئر عميق والحبل قصير.",
    "line one\nline two\n\tindented",
    "naïve café 😀 — 3.14 % of £20",
    "The harbour wall is repaired in the rain, stone by stone. " * 6,
)
_INSTRUCTION = "Find the note that says the same"
_PACKAGES = ("torch", "transformers", "sentence_transformers")
_PROMPT = re.compile(r"(?:<\|user\|>\n(?P<instruction>.+)\n)?<\|embed\|>\n", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class _Ours:
    """This package's numbers by instruction, '' for none."""

    ids: Mapping[str, list[list[int]]]
    starts: Mapping[str, list[int]]
    vectors: Mapping[str, np.ndarray]
    plain_ids: list[list[int]]
    logits: list[np.ndarray]
    embedding: EmbeddingConfig
    limit: int


def missing_packages() -> list[str]:
    """Packages that the comparison needs but that are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def verify(folder: str | Path, texts: Sequence[str] = SAMPLE_TEXTS) -> Iterator[Check]:
    """Compares token ids, causal logits, pooled hidden states and sentence-transformers' vectors.

    Args:
      folder: Exported folder.
      texts: Texts to compare, each with and without an instruction.

    Yields:
      The checks; only the first if the tokens differ, as nothing else can be compared then.

    Raises:
      InputError: PyTorch's packages are missing, the folder is not an export, or a text is too long.
    """
    folder = Path(folder)
    if missing := missing_packages():
        raise InputError(f"{', '.join(missing)} cannot be imported; {install('torch')}")
    if not is_folder(folder):
        raise InputError(f"{folder}: no config.json with safetensors; name a folder that export-hf wrote")
    named = _named_prompts(folder)
    unknown = [name for name, instruction in named.items() if instruction is None]
    instructions = {"", _INSTRUCTION} | {instruction for instruction in named.values() if instruction is not None}
    ours = _ours(folder, list(texts), sorted(instructions))
    _silence_libraries()

    tokens = _compare_tokens(folder, texts, ours)
    yield tokens
    if tokens.difference:
        return
    yield from _transformers(folder, ours)
    if unknown:
        yield Check("sentence-transformers prompts", np.inf, f"{', '.join(unknown)} not in the GRIT format")
    if (folder / SENTENCE_FILE).exists():
        yield from _sentence_transformers(folder, texts, ours, named)


def _silence_libraries() -> None:
    """Silences progress bars and warnings of unused weights; the comparison finds missing ones."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("transformers", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _named_prompts(folder: Path) -> dict[str, str | None]:
    """The instructions of the folder's named prompts; None for one in another format."""
    if not (folder / SENTENCE_FILE).exists():
        return {}
    matches = {name: _PROMPT.fullmatch(text) for name, text in _read(folder / SENTENCE_FILE)["prompts"].items()}
    return {name: match and (match["instruction"] or "") for name, match in matches.items()}


def _ours(folder: Path, texts: list[str], instructions: list[str]) -> _Ours:
    with jax.default_matmul_precision("highest"):
        model = GritModel.load(folder, dtype="float32")
        limit = max_embedding_length(model.architecture, model.embedding)
        bos, ending = model.tokenizer.bos, model.tokenizer.ending
        plain = [bos + text + ending for text in texts]
        ids, starts, vectors = {}, {}, {}
        for instruction in instructions:
            formatted = [prompts.embedding(text, instruction, bos=bos, ending=ending) for text in texts]
            vectors[instruction] = model.encode(texts, instruction=instruction, max_length=limit)
            tokenized = prompts.tokenize(formatted, model.tokenizer)
            ids[instruction] = [prompt.cut(limit).tokens.tolist() for prompt in tokenized]
            starts[instruction] = [int(prompt.spans[0, 0]) for prompt in tokenized]
        plain_ids = [encoding.ids.tolist() for encoding in model.tokenizer.encode_batch(plain)]
        logits = model.logits([text + ending for text in texts])
        return _Ours(ids, starts, vectors, plain_ids, logits, model.embedding, limit)


def _compare_tokens(folder: Path, texts: Sequence[str], ours: _Ours) -> Check:
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [(text, {}, ids) for text, ids in zip(texts, ours.plain_ids, strict=True)]
    cut = {"truncation": True, "max_length": ours.limit}
    for instruction, rows in ours.ids.items():
        prompt = prompts.embedding("", instruction, bos="").text
        expected += [(prompt + text, cut, ids) for text, ids in zip(texts, rows, strict=True)]
    wrong = [text for text, options, ids in expected if tokenizer(text, **options)["input_ids"] != ids]
    if wrong:
        return Check("token ids", np.inf, f"{len(wrong)} of {len(expected)} texts differ, the first is {wrong[0]!r}")
    return Check("token ids", 0.0, f"{len(expected)} texts equal")


def _transformers(folder: Path, ours: _Ours) -> Iterator[Check]:
    """Checks causal logits, and hidden states of the embedding pass, pooled over the text by this package."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **_model_arguments()).eval()
    head = _projection(folder) if ours.embedding.projection_dim else None
    attention = {"is_causal": False} if ours.embedding.attention == "bidirectional" else {}
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0].numpy() for ids in ours.plain_ids]
        yield _check("transformers, causal logits", logits, ours.logits)
        for instruction, rows in ours.ids.items():
            vectors = []
            for ids, start in zip(rows, ours.starts[instruction], strict=True):
                hidden = model.model(torch.tensor([ids]), **attention).last_hidden_state[0].numpy()
                vectors.append(_pool(hidden, start, ours.embedding, head))
            how = "with" if instruction else "without"
            name = f"transformers, {ours.embedding.attention} hidden states pooled {how} an instruction"
            yield _check(name, vectors, ours.vectors[instruction])


def _pool(hidden: np.ndarray, start: int, embedding: EmbeddingConfig, head: Mapping[str, np.ndarray] | None):
    vector = pool_weights(np.array([[start, len(hidden)]]), len(hidden), embedding.pooling) @ hidden
    if head is not None:
        vector = vector @ head["projection.weight"].T + head["projection.bias"]
    return vector / np.linalg.norm(vector) if embedding.normalized else vector


def _projection(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {
        name: value.float().numpy()
        for file in folder.glob("projection*.safetensors")
        for name, value in load_file(file).items()
    }


def _sentence_transformers(
    folder: Path, texts: Sequence[str], ours: _Ours, named: Mapping[str, str | None]
) -> Iterator[Check]:
    """Checks vectors in padded batches: the default prompt, every named prompt and a prompt with an instruction."""
    import sentence_transformers

    limit = _read(folder / SENTENCE_BERT_FILE).get("max_seq_length")
    if limit != ours.limit:
        yield Check("sentence-transformers, max_seq_length", np.inf, f"{limit}, not {ours.limit}")
    model: Any = sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs=_model_arguments())
    instructed = prompts.embedding("", _INSTRUCTION, bos="").text
    runs: list[tuple[str, dict[str, str], str]] = [
        ("no prompt given", {}, ""),
        ("prompt with an instruction", {"prompt": instructed}, _INSTRUCTION),
        *(
            (f"prompt_name={name!r}", {"prompt_name": name}, known)
            for name, known in named.items()
            if known is not None
        ),
    ]
    for name, arguments, instruction in runs:
        vectors = model.encode(list(texts), batch_size=4, show_progress_bar=False, **arguments)
        yield _check(f"sentence-transformers, {name}", vectors, ours.vectors[instruction])


def _model_arguments() -> dict[str, Any]:
    import torch

    return {"attn_implementation": "eager", "dtype": torch.float32}


def _check(target: str, theirs: Sequence[np.ndarray] | np.ndarray, ours: Sequence[np.ndarray] | np.ndarray) -> Check:
    if any(left.shape != right.shape for left, right in zip(theirs, ours, strict=True)):
        return Check(target, np.inf, f"shapes differ: {theirs[0].shape}, not {ours[0].shape}")
    difference = float(np.max([np.max(np.abs(left - right)) for left, right in zip(theirs, ours, strict=True)]))
    return Check(target, difference, f"largest difference {difference:.1e}")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
