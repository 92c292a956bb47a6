"""Models on a stand-in of the Hugging Face Hub."""

import subprocess
from pathlib import Path

import jax
import pytest

from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.hf.hub import is_hub_id
from grit_jax.hf.model_folder import save_folder
from tests import hub
from tests.commands import ROOT, command
from tests.hf.test_model_folder import random_model, same


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A hub with one model in two versions, and a way to run commands against it."""
    folder = tmp_path_factory.mktemp("hub")
    pretrained, params = random_model(tie_embeddings=False)
    save_folder(folder / "new", pretrained, params)
    save_folder(folder / "old", pretrained, jax.tree.map(lambda x: x + 1, params))
    with hub.serve(folder / "cache") as (server, environment):
        files = hub.folder_files(folder / "new") | {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit"}
        server.repositories["org/model"] = {"main": files, "old": hub.folder_files(folder / "old")}
        server.repositories["org/pickled"] = {"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}
        server.repositories["org/gated"] = {"main": files}
        server.gated.add("org/gated")

        def run(*arguments, **extra):
            return subprocess.run(
                command(*arguments), env=environment | extra, cwd=ROOT, capture_output=True, text=True, timeout=120
            )

        yield folder, server, run


@pytest.mark.parametrize(
    ("name", "source"), [pytest.param("org/model", "new", marks=pytest.mark.long), ("org/model@old", "old")]
)
def test_a_hub_id_imports_as_its_folder_does_and_then_without_the_network(world, tmp_path, name, source):
    folder, server, run = world
    done = run("import-hf", name, str(tmp_path / "first"))
    assert done.returncode == 0, done.stderr
    _, expected = load_for_conversion(folder / source)
    assert same(load_for_conversion(tmp_path / "first")[1], expected)
    server.requests.clear()
    done = run("import-hf", name, str(tmp_path / "second"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not server.requests
    assert same(load_for_conversion(tmp_path / "second")[1], expected)


def test_neither_pickles_nor_code_are_downloaded(world):
    folder, server, _ = world
    downloaded = {Path(path).suffix for method, path in server.requests if method == "GET" and "/resolve/" in path}
    assert not {".bin", ".py"} & (downloaded | {path.suffix for path in (folder / "cache").rglob("*")})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/gated", "its authors ask for a licence to be accepted; accept it on its page, http"),
        ("org/nothing", "not a folder here and not a model on the Hub; correct the name"),
        ("org/model@v9", "the Hub has org/model but no revision 'v9' of it"),
        ("org/pickled", "has no safetensors; pickled weights are never opened"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(world, tmp_path, name, message):
    done = world[2]("import-hf", name, str(tmp_path / "out"))
    assert done.returncode == 2
    assert f"{name}: {message}" in done.stderr


def test_an_unreachable_hub_is_said_plainly(world, tmp_path):
    done = world[2]("import-hf", "org/other", str(tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "org/other: not a folder here, not in the cache, and the Hub cannot be reached" in done.stderr


def test_what_reads_as_a_hub_id(tmp_path, monkeypatch):
    names = ["mistralai/Mistral-7B-v0.1", "org/name@main", "a/b@refs/pr/1"]
    assert all(map(is_hub_id, names))
    assert not any(map(is_hub_id, ["name", "/a/b", "./a/b", "../a/b", "a/b/c", "gs://a/b", "~/a", "a/b c", ""]))
    (tmp_path / "runs/first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("runs/first")
