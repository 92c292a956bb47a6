"""The notebooks: like their sources, at the project's address, and executed with small settings."""

import ast
import base64
import glob
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jupytext
import matplotlib.image
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from grit_jax.cli import main as cli
from grit_jax.parallel.chips import DEVICE_FILES
from tests import hub
from tests.commands import ROOT, environment
from tests.hf import families

FOLDER = ROOT / "launch/colab"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY, REF = PROJECT["urls"]["Repository"], f"v{PROJECT['version']}"
FEW = {"PACKAGES": ["http", "json"]}
BASE_OPTIONS = [
    "--train.steps=2", "--data.embedding_batch=8", "--data.generative_batch=8",
    *(f"--data.{name}_max_length=192" for name in ("query", "passage", "generative")),  # in bytes
]  # fmt: skip
# Settings that take seconds, and how many pictures there are.
SMALL = {
    "quickstart": (
        {**FEW, "STEPS": 4, "WIDTH": 32, "BATCH": 8, "BASE": "org/small", "BASE_OPTIONS": BASE_OPTIONS},
        2,
    ),
    "bring_your_own": ({**FEW, "BASE": "org/small", "STEPS": 2, "BATCH": 8}, 2),
    "export": ({**FEW, "STEPS": 2}, 1),
    "look_inside": (
        {
            **FEW, "STEPS": 4, "SNAPSHOT_EVERY": 1, "BATCHES": (4, 8), "TEMPERATURES": (0.05,), "GRID_STEPS": 2,
            "WIDTH": 32,
        },
        3,
    ),
}  # fmt: skip

each_notebook = pytest.mark.parametrize("name", SMALL)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def of_kind(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == set(SMALL)


def cells_of(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells]


@each_notebook
def test_a_notebook_is_its_source_without_outputs(name):
    notebook = read(name)
    assert cells_of(notebook) == cells_of(jupytext.read(FOLDER / f"{name}.py")), "run make notebooks"
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []


@each_notebook
def test_what_a_notebook_imports_is_there(name):
    imports = [
        (node.module, alias.name)
        for cell in of_kind(read(name), "code")
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell)))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("grit_jax")
        for alias in node.names
    ]
    assert imports
    missing = [pair for pair in imports if not hasattr(importlib.import_module(pair[0]), pair[1])]
    assert missing == []


@each_notebook
def test_addresses_are_those_of_the_project(name):
    text = "\n".join(of_kind(read(name), "markdown"))
    place = f"{REPOSITORY.removeprefix('https://').replace('github.com', 'github')}/blob/{REF}"
    assert f"(https://colab.research.google.com/{place}/launch/colab/{name}.ipynb)" in text
    linked = re.findall(rf"{re.escape(REPOSITORY)}/(\S+?)\)", text)
    assert all(link.startswith(f"blob/{REF}/") for link in linked)
    assert [link for link in linked if not (ROOT / link.removeprefix(f"blob/{REF}/")).exists()] == []


def test_all_notebooks_install_with_the_same_cell():
    assert len({of_kind(read(name), "code")[0] for name in SMALL}) == 1


def run_first_cell(monkeypatch, kind=None, returncode=0):
    """Runs the installing cell as in Colab on a machine with a kind of accelerator; gives pip's arguments."""
    installed = []
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(glob, "glob", lambda pattern: [pattern] * (pattern in DEVICE_FILES.get(kind, ())))

    def run(arguments, **options):
        installed.extend(arguments)
        return SimpleNamespace(returncode=returncode)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(cli, "main", lambda arguments: 0)
    exec(of_kind(read("quickstart"), "code")[0], {})
    return installed


def test_the_first_cell_asks_for_a_newer_python_before_it_installs_anything(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    with pytest.raises(AssertionError, match=r"Python 3.11 or newer is needed, .*Change runtime type"):
        run_first_cell(monkeypatch)


@pytest.mark.parametrize(("kind", "extra"), [("TPU", "[tpu]"), ("NVIDIA GPU", "[cuda12]"), (None, "")])
def test_colab_gets_the_pinned_package_with_what_its_devices_need(monkeypatch, kind, extra):
    *_, constraints, package = run_first_cell(monkeypatch, kind)
    assert package == f"grit-jax{extra} @ git+{REPOSITORY}@{REF}"
    assert not extra or extra[1:-1] in PROJECT["optional-dependencies"]
    assert constraints == f"{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')}/{REF}/constraints.txt"


def test_an_uploaded_archive_is_installed_in_the_place_of_an_address_that_is_not_reached(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=r"was not installed from git\+https.*upload grit_jax\.zip"):
        run_first_cell(monkeypatch, returncode=1)
    with zipfile.ZipFile("grit_jax.zip", "w") as archive:
        archive.writestr("grit_jax/constraints.txt", "jax==1")
    *_, constraints, package = run_first_cell(monkeypatch, "TPU")
    assert package == f"grit-jax[tpu] @ {(tmp_path / 'grit_jax.zip').as_uri()}"
    assert Path(constraints).read_text() == "jax==1"


@each_notebook
def test_colab_opens_a_notebook_on_an_accelerator(name):
    assert read(name).metadata["accelerator"] == "GPU"


def test_a_package_that_was_loaded_before_it_was_replaced_asks_for_a_new_session(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    with pytest.raises(AssertionError, match=r"was loaded before 0\.0 was installed: choose Runtime > Restart session"):
        run_first_cell(monkeypatch)


def execute(name, folder, more):
    """Runs a notebook with small settings, put behind its own as papermill does; gives its pictures."""
    settings, notebook = SMALL[name][0], read(name)
    (place,) = (place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    known = {line.targets[0].id for line in ast.parse(notebook.cells[place].source).body}
    assert settings.keys() <= known
    lines = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more)
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    return [data["image/png"] for data in shown if "image/png" in data]


def check_pictures(pictures, folder, count):
    assert len(pictures) == count
    for picture in pictures:
        (folder / "picture.png").write_bytes(base64.b64decode(picture))
        assert matplotlib.image.imread(folder / "picture.png")[..., :3].std() > 0.05, "an empty picture"


@pytest.mark.long
@pytest.mark.parametrize("name", ["export", "look_inside"])
def test_a_notebook_runs_from_its_first_cell_to_its_last(name, tmp_path):
    check_pictures(execute(name, tmp_path, {}), tmp_path, SMALL[name][1])


@pytest.mark.long
@pytest.mark.parametrize("name", ["quickstart", "bring_your_own"])
def test_a_model_of_the_hub_is_fetched_and_trained(name, tmp_path):
    families.save(families.make("Llama", {"num_hidden_layers": 1}), tmp_path / "small")
    with hub.serve(tmp_path / "cache") as (server, variables):
        server.repositories["org/small"] = {"main": hub.folder_files(tmp_path / "small")}
        more = {key: value for key, value in variables.items() if key.startswith("HF_")}
        pictures = execute(name, tmp_path, more)
    check_pictures(pictures, tmp_path, SMALL[name][1])
