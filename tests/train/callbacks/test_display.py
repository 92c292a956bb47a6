from grit_jax.train.callbacks.display import Display
from tests.train.callbacks import made_up


def test_plain_output_has_a_line_every_few_steps(tmp_path, capsys):
    made_up.run(tmp_path, Display(10), steps=21)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/21" for step in (1, 10, 20, 21)]
    assert "embedding 1.000  generative 3.000  " in lines[0] and "tokens/s" in lines[0]
