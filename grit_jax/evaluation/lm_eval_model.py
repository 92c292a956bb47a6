"""A model for `lm-eval`, EleutherAI's harness: `python -m grit_jax.evaluation.lm_eval_model --model grit_jax ...`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows

from grit_jax.errors import InputError
from grit_jax.evaluation.task import Session
from grit_jax.inference.model import GritModel
from grit_jax.text import prompts

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


@register_model("grit_jax")
class LMEvalModel(LM):
    """Scores and completes lm-eval's requests.

    Contexts follow BOS as they are; with `--apply_chat_template` they are GRIT's user messages. A context that is too
    long for the model loses its first tokens; a continuation that is too long is scored on its last tokens only. White
    space at the end of a context counts as the continuation's, as in the harness's own models, except for the line
    break after the assistant's marker.

    Args:
      pretrained: Run folder, checkpoint or Hugging Face folder, or a model.
      step: Checkpoint of a run; None takes the newest.
      seed: Seed of sampled completions.
      **_: Arguments that the harness gives every model, such as batch size and device; ignored.
    """

    def __init__(self, pretrained: str | GritModel, *, step: int | None = None, seed: int = 0, **_: Any):
        super().__init__()
        model = pretrained if isinstance(pretrained, GritModel) else GritModel.load(pretrained, step=step)
        self._model, self._session = model, Session(model, seed=seed)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Sum of log p of each continuation, and whether all its tokens are the likeliest."""
        pairs = [request.args for request in requests]
        contexts, continuations = zip(*self._split(pairs), strict=True)
        scored = self._model.log_likelihoods(contexts, continuations, raw=True)
        found = list(zip(scored.values.tolist(), scored.greedy.tolist(), strict=True))
        self._cache("loglikelihood", pairs, found)
        return found

    def _split(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Splits pairs where scoring begins: before white space at a context's end, or at the last tokens that fit."""
        bos, num_bos = self._model.tokenizer.bos, int(self._model.tokenizer.bos_id is not None)
        most = self._model.architecture.max_length - num_bos - 1
        texts = [context + continuation for context, continuation in pairs]
        split = []
        encodings = self._model.tokenizer.encode_batch([bos + text for text in texts])
        for (context, _), text, (_, starts) in zip(pairs, texts, encodings, strict=True):
            start = len(context if prompts.awaits_completion(context) else context.rstrip())
            if len(starts) > most:  # score a character of several tokens whole or not at all
                start = max(start, int(starts[starts > starts[-most - 1]][0]) - len(bos))
            split.append((text[:start], text[start:]))
        return split

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Sum of log p of each text, in windows of the model's length."""
        tokenizer, longest = self._model.tokenizer, self._model.architecture.max_length
        before = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if before is None:
            raise InputError("the model's tokenizer has neither BOS nor EOS; a text's first token cannot be scored")
        windows, owners = [], []
        for i, encoding in enumerate(tokenizer.encode_batch([request.args[0] for request in requests])):
            for read, scored in get_rolling_token_windows(encoding.ids.tolist(), before, longest - 1, 1):
                tokens = np.array([*read[: len(read) - len(scored) + 1], *scored], np.int32)
                span = np.array([[len(tokens) - len(scored), len(tokens)]], np.int32)
                windows.append(prompts.TokenizedPrompt(tokens, span))
                owners.append(i)
        values = np.zeros(len(requests))
        if windows:
            np.add.at(values, owners, self._model.score(windows).values)
        found = values.tolist()
        self._cache("loglikelihood_rolling", [request.args for request in requests], found)
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Completions up to the first stop string, many in one batch.

        Equal requests with a temperature get different samples.

        Raises:
          InputError: `max_gen_toks` leaves no room for a context.
        """
        longest, found = self._model.architecture.max_length, [""] * len(requests)
        seen, batches = Counter[tuple[str, str]](), dict[tuple[str, int], list[int]]()
        for i, request in enumerate(requests):
            context, options = request.args
            given = normalize_gen_kwargs(options)
            if given["max_gen_toks"] >= longest:
                raise InputError(
                    f"max_gen_toks={given['max_gen_toks']} leaves no room for a context in the model's {longest} "
                    "tokens; lower it, for all tasks with --gen_kwargs max_gen_toks=..."
                )
            key = json.dumps(given, sort_keys=True)
            batches.setdefault((key, seen[context, key] if given.get("temperature") else 0), []).append(i)
            seen[context, key] += 1
        for (key, sample), indices in batches.items():
            given = json.loads(key)
            room = given["max_gen_toks"]
            completions = self._session.completions(
                [self._fitting(requests[i].args[0], room) for i in indices],
                max_new_tokens=room, stop=given["until"], raw=True, temperature=float(given.get("temperature", 0.0)),
                top_p=float(given.get("top_p", 1.0)), sample=sample,
            )  # fmt: skip
            for i, completion in zip(indices, completions, strict=True):
                assert completion is not None
                found[i] = completion
        self._cache("generate_until", [request.args for request in requests], found)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """GRIT's format without BOS; without `add_generation_prompt` the last message begins the completion."""
        history, prefix = (chat_history, "") if add_generation_prompt else (
            chat_history[:-1], chat_history[-1]["content"]
        )  # fmt: skip
        return prompts.generation(history, bos="", eos=self._model.tokenizer.eos, prefix=prefix)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name of the only template."""
        return "grit"

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in request caches."""
        return self._model.tokenizer.fingerprint

    def _fitting(self, context: str, room: int) -> str:
        """The context, cut at its beginning to leave room for a completion."""
        limit = self._model.architecture.max_length - room
        while (over := int(self._model.prompt_lengths([context], raw=True)[0]) - limit) > 0:
            starts = self._model.tokenizer.encode(context).starts
            # A character may be several tokens, and the rest may become more tokens than before.
            context = context[max(1, starts[over]) :] if over < len(starts) else ""
        return context

    def _cache(self, request_type: str, arguments: Sequence[tuple], found: Sequence[Any]) -> None:
        for given, value in zip(arguments, found, strict=True):
            self.cache_hook.add_partial(request_type, given, value)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
