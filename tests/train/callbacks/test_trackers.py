import json
import sys
from types import ModuleType

import pytest

from grit_jax.config import LoggingConfig
from grit_jax.errors import InputError
from grit_jax.train.callbacks.trackers import JsonlTracker, TensorBoardTracker, make_trackers
from grit_jax.train.metrics import read_metrics


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, resume_step=0)
    for step in (1, 2, 3, 4):
        tracker.log(step, {"loss": step / 2})
    tracker.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut short by a crash
    tracker = JsonlTracker(path, resume_step=2)
    tracker.log(3, {"loss": 9.0})
    tracker.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_tensorboard_events_are_written(tmp_path):
    tracker = TensorBoardTracker(tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert any(path.stat().st_size > 0 for path in tmp_path.iterdir())


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
    config = LoggingConfig(trackio="project")
    with make_trackers(config, tmp_path / "first", resume_step=0, resolved="a: 1") as trackers:
        for tracker in trackers:
            tracker.log(3, {"loss": 1.0})
    init = {"project": "project", "name": "first", "resume": "allow", "config": {"yaml": "a: 1"}}
    assert trackio == [("init", (), init), ("log", ({"loss": 1.0},), {"step": 3}), ("finish", (), {})]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = LoggingConfig(**{name: "project"})
    message = rf"logging.{name}=\"project\" needs {name}, which cannot be imported; .*-e '\.\[{name}\]'"
    with (
        pytest.raises(InputError, match=message),
        make_trackers(config, tmp_path, resume_step=0, resolved=""),
    ):
        pass
