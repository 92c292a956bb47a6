import json
import sys
from types import ModuleType

import pytest

from grit_jax.config import Config, InputError, LoggingConfig, TransformerConfig
from grit_jax.train.metrics import Display, JsonlTracker, TensorBoardTracker, make_trackers, model_flops, read_metrics


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


def test_flops_of_a_model_by_hand():
    # Per token 2 layers of 8*8 query, 2 of 8*4 key and value, 8*8 out, 3 of 8*16 MLP: 576 weights each.
    config = TransformerConfig(embed_dim=8, mlp_dim=16, num_layers=2, num_heads=2, num_kv_heads=1).resolve(10)
    flops = model_flops(config, tokens=3, generative_tokens=1, attention_pairs=5)
    assert flops == 6 * (2 * (576 * 3 + 2 * 8 * 5) + 10 * 8)


def test_plain_output_has_a_line_every_few_steps(capsys):
    values = {"loss/embedding": 1.5, "loss/generative": 2.5, "tokens_per_second": 1234.0}
    with Display(Config(), start=0) as display:
        for step in range(1, 21):
            display.step(step, values)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 10", "step 20"]
    assert "embedding 1.500  generative 2.500  1,234 tokens/s" in lines[0]
