"""Models and data sets from a stand-in of the Hugging Face Hub."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.checkpoints.opening import load_for_conversion
from grit_jax.cli.main import main
from grit_jax.data.sources import find_files, open_source
from grit_jax.datatools.fetch import DATA_SETS
from grit_jax.hf.model_folder import save_folder
from grit_jax.runs.lock import writer_lock
from tests import hub
from tests.bucket import BUCKET, Bucket
from tests.commands import ROOT, TINY, command, environment, grit_jax, write_data
from tests.hf.test_model_folder import random_model, same
from tests.multiprocess import launch

MEDI2, TULU2 = (f"datasets/{DATA_SETS[name].repository}" for name in ("medi2", "tulu2"))
FILES = {
    f"{name}.jsonl": b"".join(
        json.dumps({"query": ["find", f"{name} {i}"], "pos": [["", f"this is {name} {i}"]]}).encode() + b"\n"
        for i in range(3)
    )
    for name in ("agnews", "npr", "xsum")
}


class World:
    """A hub, and commands that know it."""

    def __init__(self, folder, server, environment):
        self.folder, self.server, self.environment = folder, server, environment

    def arguments(self, kind, name, output, *more):
        return ["fetch", kind, name, str(output), f"--downloads={self.folder / 'downloads'}", *more]

    def start(self, *arguments):
        return subprocess.Popen(
            command(*self.arguments(*arguments)), env=self.environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments):
        """Exit code, stdout and stderr of a fetch in this process."""
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(self.arguments(*arguments))
        return code, out.getvalue(), errors.getvalue()

    def run_apart(self, *arguments):
        """The same in a process of its own."""
        process = self.start(*arguments)
        try:
            out, errors = process.communicate(timeout=300)
        finally:
            process.kill()
        return process.returncode, out, errors

    def killed_while_sending(self, file, *arguments):
        """Starts a fetch and kills it when it waits for a file, having what came before; forgets all requests."""
        self.server.held.add(file)
        process = self.start(*arguments)
        deadline = time.monotonic() + 300
        while file not in self.server.sent() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.communicate()
        self.server.held.clear()
        assert file in self.server.sent()
        self.server.requests.clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Exported models: one in several files of bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    pretrained, params = random_model(tie_embeddings=False)
    save_folder(folder / "model", pretrained, params, dtype="bfloat16", max_shard_bytes=20_000)
    return folder


@pytest.fixture
def world(tmp_path, folders, monkeypatch):
    with hub.serve(tmp_path / "cache") as (server, variables):
        hub.ask_from_here(server, monkeypatch)
        model = hub.folder_files(folders / "model")
        more = {
            "consolidated.safetensors": b"twice",
            "pytorch_model.bin": b"pickle",
            "modeling.py": b"raise SystemExit",
        }
        server.repositories["org/model"] = {"main": model | more | {"README.md": b"---\nlicense: apache-2.0\n---\n"}}
        server.repositories[MEDI2] = {DATA_SETS["medi2"].revision: FILES | {"README.md": b"# MEDI2"}}
        yield World(tmp_path, server, variables | {"XLA_FLAGS": environment()["XLA_FLAGS"]})


def weights_of(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_model_comes_once_and_as_it_is_stored(world, folders, tmp_path):
    output = tmp_path / "models/model"
    code, printed, errors = world.run("model", "org/model", output)
    assert code == 0, errors
    assert "licence: apache-2.0" in printed and "org/model" in printed
    assert not {"consolidated.safetensors", "pytorch_model.bin", "modeling.py"} & set(world.server.sent())
    _, expected = load_for_conversion(folders / "model", dtype=jnp.bfloat16)
    found = load_for_conversion(output, dtype=jnp.bfloat16)[1]
    assert same(found, expected)
    manifest = json.loads((output / "fetch.json").read_text())
    assert manifest["commit"] == hub.commit(world.server.repositories["org/model"]["main"])
    for name in weights_of(folders / "model"):
        content = (folders / "model" / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert not list((tmp_path / "downloads").rglob("*.safetensors"))

    world.server.requests.clear()
    code, printed, _ = world.run("model", "org/model", output)
    assert (code, world.server.requests) == (0, [])
    assert "is already there" in printed


def test_an_interrupted_model_goes_on_with_the_file_that_was_missing(world, folders, tmp_path):
    output, weights = tmp_path / "model", weights_of(folders / "model")
    world.killed_while_sending(weights[-1], "model", "org/model", output)
    code, _, errors = world.run("model", "org/model", output, "--keep-downloads")
    assert code == 0, errors
    assert [name for name in world.server.sent() if name in weights] == weights[-1:]
    assert len(list((tmp_path / "downloads").rglob("*.safetensors"))) == len(weights)
    assert same(load_for_conversion(output)[1], load_for_conversion(folders / "model")[1])


@pytest.mark.parametrize("small", [False, True])
def test_what_comes_damaged_is_refused_and_comes_again(world, folders, tmp_path, small):
    name = "config.json" if small else weights_of(folders / "model")[0]
    content = (folders / "model" / name).read_bytes()
    world.server.damaged[name] = content[:-1] + b" "
    code, _, errors = world.run("model", "org/model", tmp_path / "model")
    assert (code, f"org/model: {name} arrived damaged" in errors, "run the same command again" in errors) == (
        1,
        True,
        True,
    )
    assert not (tmp_path / "model/fetch.json").exists()
    world.server.damaged.clear()
    code, _, errors = world.run("model", "org/model", tmp_path / "model")
    assert code == 0, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "org/gated"], "org/gated: its authors ask for a licence to be accepted; accept it on its page"),
        (["model", "org/nothing"], "org/nothing: not a model on the Hub"),
        (["model", "org/pickled"], "org/pickled: has no safetensors"),
        (["data", "e5s"], "e5s was never released; take medi2"),
        (["data", "medi3"], "medi3: not a known data set; known are medi, medi2, medi2bge, tulu2"),
        (["data", "tulu2"], "not a dataset on the Hub"),
    ],
)
def test_what_cannot_be_had_is_said_plainly(world, tmp_path, arguments, message):
    world.server.repositories["org/gated"] = world.server.repositories["org/model"]
    world.server.gated.add("org/gated")
    world.server.repositories["org/pickled"] = {"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}}
    code, _, errors = world.run(*arguments, tmp_path / "out")
    assert (code, message in errors) == (2, True), errors
    if "gated" in message:
        assert f"{world.server.address}/org/gated, then log in with `hf auth login` or set HF_TOKEN" in errors


def test_what_is_somebody_elses_stays(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    code, _, errors = world.run("data", "medi2", tmp_path / "out")
    assert (code, "exists and is not empty" in errors) == (2, True)
    assert world.run("data", "medi2", tmp_path / "medi2")[0] == 0
    code, _, errors = world.run("data", "tulu2", tmp_path / "medi2")
    assert (code, "holds GritLM/MEDI2" in errors) == (2, True)


MANIFEST = {"repository": "GritLM/MEDI2", "revision": None, "commit": "c", "licence": None, "files": {}}


@pytest.mark.parametrize("name", ["fetch.json", "fetch.begun.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", json.dumps(MANIFEST | {"commit": 1}).encode(),
     json.dumps(MANIFEST | {"files": {"npr.jsonl": 3}}).encode()],
)  # fmt: skip
def test_a_damaged_manifest_is_named_with_the_remedy(world, tmp_path, name, content):
    (tmp_path / "medi2").mkdir()
    (tmp_path / "medi2" / name).write_bytes(content)
    code, _, errors = world.run("data", "medi2", tmp_path / "medi2")
    assert (code, errors.count("\n"), world.server.requests) == (2, 1, [])
    assert f"{tmp_path / 'medi2' / name}: is damaged (" in errors
    assert "remove all of its folder to fetch again" in errors


def test_a_file_of_which_not_all_is_known_is_copied_again(world, tmp_path):
    commit = hub.commit(world.server.repositories[MEDI2][DATA_SETS["medi2"].revision])
    begun = MANIFEST | {"revision": DATA_SETS["medi2"].revision, "commit": commit, "files": {"npr.jsonl": {"bytes": 1}}}
    (tmp_path / "medi2").mkdir()
    (tmp_path / "medi2/fetch.begun.json").write_text(json.dumps(begun))
    code, _, errors = world.run("data", "medi2", tmp_path / "medi2")
    assert code == 0, errors
    assert (tmp_path / "medi2/npr.jsonl").read_bytes() == FILES["npr.jsonl"]


def test_an_index_without_files_is_refused(world, tmp_path):
    world.server.repositories["org/model"]["main"]["model.safetensors.index.json"] = b"{}"
    code, _, errors = world.run("model", "org/model", tmp_path / "model")
    assert (code, "model.safetensors.index.json: has no weight_map of tensors and their files" in errors) == (2, True)


@pytest.mark.parametrize(("status", "expected"), [(401, 2), (403, 2), (500, 1), (429, 1)])
def test_a_hub_that_refuses_differs_from_one_that_fails(world, tmp_path, status, expected):
    world.server.broken[DATA_SETS["medi2"].revision] = (
        status,
        {"error": "Invalid credentials in Authorization header"},
    )
    code, _, errors = world.run("data", "medi2", tmp_path / "medi2")
    assert (code, errors.count("\n")) == (expected, 1)
    remedy = "HF_TOKEN to a token that may read it" if expected == 2 else "; run the same command again"
    assert f"({status}: Invalid credentials" in errors and remedy in errors
    world.server.broken.clear()
    assert world.run("data", "medi2", tmp_path / "medi2")[0] == 0


def test_an_interrupted_download_with_damaged_records_goes_on(world, tmp_path):
    assert world.run("data", "medi2", tmp_path / "first", "--keep-downloads")[0] == 0
    records = list((tmp_path / "downloads").rglob("*.metadata"))
    assert records
    for path in records:
        path.write_bytes(b"\xff")
    code, _, errors = world.run("data", "medi2", tmp_path / "second")
    assert code == 0, errors
    assert (tmp_path / "second/npr.jsonl").read_bytes() == FILES["npr.jsonl"]


def test_interrupted_data_goes_on_and_is_what_training_reads(world, tmp_path):
    output = tmp_path / "medi2"
    world.killed_while_sending("npr.jsonl", "data", "medi2", output)
    assert not (output / "fetch.json").exists()
    with writer_lock(output):
        code, _, errors = world.run("data", "medi2", output)
        assert (code, f"{output} is being written by" in errors) == (2, True)
    code, printed, errors = world.run("data", "medi2", output)
    assert code == 0, errors
    assert world.server.sent() == ["npr.jsonl", "xsum.jsonl"]
    assert "9 embedding records in 3 files" in printed
    assert "licence: none stated on its card" in printed
    found = find_files(str(output))
    assert {path.name: path.read_bytes() for path in found} == FILES
    manifest = json.loads((output / "fetch.json").read_text())
    assert manifest["revision"] == DATA_SETS["medi2"].revision
    assert manifest["files"] == {
        path.name: {
            "bytes": len(FILES[path.name]), "sha256": hashlib.sha256(FILES[path.name]).hexdigest(),
            "records": len(open_source(path)), "stream": "embedding",
        }
        for path in found
    }  # fmt: skip


@pytest.fixture
def bucket(world, monkeypatch):
    """gs:// for the world's commands and for processes of this test."""
    pytest.importorskip("gcp_storage_emulator")
    bucket = Bucket()
    bucket.start()
    for name, value in bucket.environment.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
            world.environment[name] = value
    monkeypatch.setenv("XDG_CACHE_HOME", str(world.folder / "index"))
    yield f"gs://{BUCKET}"
    bucket.stop()


COMPARE = """
import sys
import jax, numpy as np
from etils import epath
from grit_jax.checkpoints.opening import load_for_conversion
model, fetched_model, data, fetched_data = sys.argv[1:]
pairs = [load_for_conversion(path)[1] for path in (model, fetched_model)]
assert jax.tree.all(jax.tree.map(np.array_equal, *pairs))
for path in epath.Path(data).iterdir():
    assert (epath.Path(fetched_data) / path.name).read_bytes() == path.read_bytes(), path
print("the same")
"""


@pytest.mark.long
def test_model_and_data_come_into_a_bucket(world, bucket, folders, tmp_path):
    large = {"large.jsonl": b"".join(FILES.values()) * 10_000}  # more than one request takes
    world.server.repositories[MEDI2][DATA_SETS["medi2"].revision] |= large
    for kind, name in (("model", "org/model"), ("data", "medi2"), ("data", "medi2")):
        world.server.requests.clear()
        code, _, errors = world.run_apart(kind, name, f"{bucket}/{kind}")
        assert code == 0, errors
    assert world.server.requests == []  # the second time
    (tmp_path / "data").mkdir()
    for name, content in (FILES | large).items():
        (tmp_path / "data" / name).write_bytes(content)
    arguments = [folders / "model", f"{bucket}/model", tmp_path / "data", f"{bucket}/data"]
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, *map(str, arguments)], env=environment(), cwd=ROOT, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "the same", done.stderr


TRAIN = """
    import sys
    from grit_jax.config import load_config
    from grit_jax.train.loop import Trainer

    assert Trainer(load_config(sys.argv[1], sys.argv[2:])).fit()
"""


def prepare(world, config, *more):
    """launch/prepare.sh on this machine."""
    programs = world.folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, words in (("python", [sys.executable]), ("grit-jax", command())):
        (programs / name).write_text(f'#!/bin/bash\nexec {shlex.join(words)} "$@"\n')
        (programs / name).chmod(0o755)
    variables = world.environment | {"GRIT_BIN": str(programs), "PYTHONPATH": str(ROOT)}
    arguments = [ROOT / "launch/prepare.sh", f"--config={config}", f"--bucket=gs://{BUCKET}", *more]
    return subprocess.run(arguments, env=variables, cwd=world.folder, capture_output=True, text=True, timeout=900)


@pytest.mark.long
def test_from_the_hub_to_a_searched_index(world, bucket, tmp_path):
    pytest.importorskip("sentence_transformers")
    rows = write_data(tmp_path / "rows")
    world.server.repositories[MEDI2] = {
        DATA_SETS["medi2"].revision: {"a.jsonl": (rows / "embedding.jsonl").read_bytes()}
    }
    world.server.repositories[TULU2] = {
        DATA_SETS["tulu2"].revision: {"a.jsonl": (rows / "generative.jsonl").read_bytes()}
    }
    config = tmp_path / "config.yaml"
    config.write_text("model: {init: models/org/model}\ndata: {train: [data/medi2, data/tulu2]}\ntrain: {steps: 4}\n")
    done = prepare(world, config, f"--downloads={tmp_path / 'downloads'}")
    assert done.returncode == 0, done.stderr

    for_hosts = subprocess.run(
        [sys.executable, ROOT / "launch/config.py", config, f"{bucket}/runs/toy", *TINY[5:]],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tmp_path / "hosts.yaml").write_text(for_hosts.stdout)
    launch.run(TRAIN, tmp_path / "hosts.yaml", num_processes=2, devices_each=2, timeout=900)

    done = grit_jax("export-hf", f"{bucket}/runs/toy", tmp_path / "exported", timeout=900)  # and compares with PyTorch
    assert done.returncode == 0, done.stdout + done.stderr
    texts = [json.loads(line)["pos"][0][1] for line in (rows / "embedding.jsonl").read_text().splitlines()]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    index = {}
    for name, model in (("run", f"{bucket}/runs/toy"), ("exported", tmp_path / "exported")):
        done = grit_jax("encode", model, "--input", tmp_path / "texts.txt", "--output", tmp_path / f"{name}.npy")
        assert done.returncode == 0, done.stderr
        index[name] = np.load(tmp_path / f"{name}.npy")
    assert np.allclose(index["run"], index["exported"], atol=1e-5)
    assert np.array_equal(np.argmax(index["exported"] @ index["run"].T, axis=1), np.arange(len(texts)))
