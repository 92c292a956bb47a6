import json
import sys
from types import ModuleType

import pytest

from grit_jax.config import LoggingConfig
from grit_jax.errors import InputError
from grit_jax.runs.logs import read_lines
from grit_jax.train.callbacks.trackers import open_trackers


def log(folder, lines, *, resume_step=0, resolved="", **settings):
    """Logs lines by step to the trackers of settings."""
    with open_trackers(LoggingConfig(**settings), folder, resume_step=resume_step, resolved=resolved) as logs:
        for step, values in lines.items():
            for one in logs:
                one(step, values)


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(tmp_path, {step: {"loss": step / 2} for step in (1, 2, 3, 4)})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut short by a crash
    log(tmp_path, {3: {"loss": 9.0}}, resume_step=2)
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_tensorboard_events_are_written(tmp_path):
    log(tmp_path, {1: {"loss": 1.0}}, tensorboard=True)
    assert any(path.stat().st_size > 0 for path in (tmp_path / "tensorboard").iterdir())


@pytest.fixture
def trackio(monkeypatch):
    """A module of that name, with a list of the calls made to it."""
    calls = []
    fake = ModuleType("trackio")
    for name in ("init", "log", "finish"):
        setattr(fake, name, lambda *args, _called=name, **options: calls.append((_called, args, options)))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return calls


def test_trackio_gets_the_metrics_under_the_run_folders_name(trackio, tmp_path):
    log(tmp_path / "first", {3: {"loss": 1.0}}, resolved="a: 1", trackio="project")
    init = {"project": "project", "name": "first", "resume": "allow", "config": {"yaml": "a: 1"}}
    assert trackio == [("init", (), init), ("log", ({"loss": 1.0},), {"step": 3}), ("finish", (), {})]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"logging.{name}=\"project\" needs {name}, which cannot be imported; .*-e '\.\[{name}\]'"
    with pytest.raises(InputError, match=message):
        log(tmp_path, {}, **{name: "project"})
