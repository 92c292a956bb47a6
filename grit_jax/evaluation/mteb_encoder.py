"""A model for `mteb`, the Massive Text Embedding Benchmark's own harness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from grit_jax.evaluation.suite import packaged_instructions
from grit_jax.evaluation.task import Session
from grit_jax.inference.model import GritModel

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

MAX_LENGTH = 512


class MtebEncoder(AbsEncoder):
    """Embeds mteb's texts: `mteb.evaluate(MtebEncoder(model), tasks)`.

    Queries and symmetric texts carry their task's instruction, documents none. mteb stores results by name, the model's
    fingerprint, `max_length` and the instructions, which keeps results of different settings apart.

    Args:
      model: The model to evaluate.
      name: Its name in mteb, `owner/name`.
      instructions: Instructions by task name; None takes the package's, one for each of MTEB's 56 English tasks. A task
        without one takes mteb's own prompt.
      max_length: Most tokens to keep of a text, instruction included.
    """

    def __init__(
        self,
        model: GritModel,
        *,
        name: str = "grit_jax/model",
        instructions: Mapping[str, str] | None = None,
        max_length: int = MAX_LENGTH,
    ):
        self.model, self._session = model, Session(model, max_length)
        self.prompts_dict = packaged_instructions() if instructions is None else dict(instructions)
        digested = json.dumps(self.prompts_dict, sort_keys=True).encode()
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": name,
                "revision": model.fingerprint(),
                "experiment_kwargs": {
                    "max_length": max_length,
                    "instructions": hashlib.sha256(digested).hexdigest()[:16],
                },
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
                "max_tokens": model.architecture.max_length,
                "embed_dim": model.embed_dim,
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, list[str]]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """float32 [texts, embed]; a blank text is a zero vector."""
        texts = [text for batch in inputs for text in batch["text"]]
        is_document = prompt_type is PromptType.document
        return self._session.embed(texts, "" if is_document else self.get_instruction(task_metadata, prompt_type))


def register(path: str | Path, *, name: str | None = None, **options: Any) -> str:
    """Registers a run folder, a checkpoint or a Hugging Face folder for `mteb.get_model(name)`.

    Args:
      path: Path of the model.
      name: `owner/name`; None takes `grit_jax/` and the folder's name.
      **options: Further arguments of `MtebEncoder`.

    Returns:
      The name.
    """
    name = name or f"grit_jax/{Path(path).resolve().name}"
    encoder = MtebEncoder(GritModel.load(path), name=name, **options)

    def load(*_: Any, **__: Any) -> MtebEncoder:
        return encoder

    assert encoder.mteb_model_meta is not None
    MODEL_REGISTRY[name] = encoder.mteb_model_meta.model_copy(update={"loader": load})
    return name
