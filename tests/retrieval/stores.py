"""Small corpora and stores."""

import hashlib
import json

from grit_jax.checkpoints.checkpoint import CheckpointMetadata, save_params
from grit_jax.retrieval.documents import find_corpus
from grit_jax.retrieval.ingest import Wanted, add_documents, add_vectors, sole_indexer
from tests.evaluation import tasks
from tests.hf.test_model_folder import random_model

WORDS = [*tasks.WORDS, "sea", "hut", "sun"]


def document(number):
    """Documents 5, 11, 17, ... repeat the text of an earlier one under another id; 8, 17, ... have no text."""
    text = f"{WORDS[number % 15]} {WORDS[(number // 2) % 15]} " * (1 + number % 4)
    same = number - 3 if number % 6 == 5 else number
    if number % 9 == 8:
        return {"_id": f"d{number}", "text": " "}
    return {"_id": f"d{number}", "title": f"Title {same}", "text": text if same == number else document(same)["text"]}


def write_corpus(path, numbers=range(25)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document(number)) + "\n" for number in numbers))
    return path


def save_model(folder, **architecture):
    """A tiny model with random weights, as a checkpoint."""
    pretrained, params = random_model(tie_embeddings=False, **architecture)
    about = CheckpointMetadata(pretrained.architecture, pretrained.embedding, pretrained.tokenizer.files())
    save_params(folder, params, about)
    return folder


def index(folder, model, *paths, name="tiny", shard_rows=4, **wanted):
    """Makes or grows a store in this process and returns its manifest."""
    with sole_indexer(folder) as writer:
        corpus = find_corpus([str(path) for path in paths])
        add_documents(folder, corpus, model, Wanted(**wanted), name=name, shard_rows=shard_rows, writer=writer)
        return add_vectors(folder, model, writer=writer)


def content(folder):
    """The sha256 of every file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
