"""A model that says and embeds what a test wants, to see what tasks ask it and make of it."""

from types import SimpleNamespace

import numpy as np

from grit_jax.evaluation.task import Session
from grit_jax.inference.embedder import Encoded
from grit_jax.inference.scorer import Likelihoods


class Fake:
    """Answers by `answer(prompt, prefix)`, embeds by `embed(text)`, scores by `score(context, continuation)`."""

    def __init__(self, *, answer=None, embed=None, score=None, max_length=4096):
        self._answer, self._embed, self._score = answer, embed, score
        self.architecture = SimpleNamespace(max_length=max_length)
        self.asked = []

    def encode_with_counts(self, texts, *, instruction, max_length, progress):
        self.asked += [(instruction, text) for text in texts]
        vectors = np.array([self._embed(text) for text in texts], np.float32).reshape(len(texts), -1)
        return Encoded(vectors, 0, 0)

    def prompt_lengths(self, messages, *, prefix="", raw=False):
        return np.array([len(message) for message in messages])

    def generate(self, messages, *, prefix, **options):
        self.asked += zip(messages, prefix, strict=True)
        return [self._answer(message) for message in messages]

    def log_likelihoods(self, contexts, continuations, *, prefix, progress):
        self.asked += [(context, prefix) for context in contexts]
        values = np.array([self._score(*pair) for pair in zip(contexts, continuations, strict=True)], float)
        return Likelihoods(values, np.ones(len(values), int), np.ones(len(values), bool), 0)


def session(**behaviour):
    return Session(Fake(**behaviour))
