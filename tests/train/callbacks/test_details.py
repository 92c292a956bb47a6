from grit_jax.train.callbacks.details import Details
from grit_jax.train.health import GRAM
from grit_jax.train.step import TOKEN_LOSSES
from tests.train.callbacks import made_up


def test_every_step_is_handed_out_once_with_its_own_numbers(tmp_path):
    lines = made_up.run(tmp_path, Details(10), make=lambda step: made_up.metrics(generative=float(step))).lines
    assert list(lines) == list(range(1, 13))
    assert all(line["loss/generative"] == step for step, line in lines.items())
    # Batch `step` is number step - 1 of the schedule.
    assert [name for name in lines[1] if name.startswith("loss/embedding/")] == ["loss/embedding/nli"]
    assert "loss/embedding/quora" in lines[2]
    assert not {GRAM, f"{TOKEN_LOSSES}generative", "attention_pairs"} & lines[10].keys()


def test_details_come_every_few_steps(tmp_path):
    lines = made_up.run(tmp_path, Details(4)).lines
    detailed = [step for step, line in lines.items() if "embedding/effective_rank" in line]
    assert detailed == [1, 4, 8, 12]
    assert [step for step, line in lines.items() if line.get("loss/generative/cot") == 8] == detailed
    assert not any("embedding/effective_rank" in line for line in made_up.run(tmp_path, Details(None)).lines.values())
