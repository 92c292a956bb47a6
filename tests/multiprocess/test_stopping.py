"""Processes of one run that is told to stop: they do so after the same step."""

import pytest

from tests.commands import ROOT, TINY, write_data
from tests.multiprocess import launch

# Rounds of work, each told to stop in another way: by one process or by all, early or late, or not at all.
ROUNDS = """
    import random, threading, time
    from grit_jax.parallel.distributed import JointStop, wait_for_all

    here = jax.process_index()
    for number in range(8):
        asked, shared, own = threading.Event(), random.Random(number), random.Random(100 * number + here)
        if number and (number % 3 == 0 or here == number % 3):
            threading.Timer(own.uniform(0, 1.5), asked.set).start()
        with JointStop(asked) as stop:
            done, behind = 0, False
            while done < 30 and stop.proceed():
                done += 1
                time.sleep(own.choice([0, 0.01, 0.1]))
                if shared.random() < 0.3:
                    wait_for_all()  # as a step that the others have not begun yet
            refused = not any(stop.proceed() for _ in range(3)) if done < 30 else None
            wait_for_all()
        print(number, done, refused)
"""


@pytest.mark.long
def test_all_processes_stop_after_the_same_piece_of_work(tmp_path):
    outputs = launch.run(ROUNDS, num_processes=3, devices_each=1, timeout=200)
    assert outputs[0] == outputs[1] == outputs[2]
    rounds = [line.split() for line in outputs[0].splitlines()]
    assert rounds[0] == ["0", "30", "None"] and len(rounds) == 8
    assert any(done != "30" for _, done, _ in rounds)
    assert all(refused == "True" for _, done, refused in rounds if done != "30")


TRAIN = """
    import os, signal, sys, threading, time
    from grit_jax.config import load_config
    from grit_jax.train.loop import Trainer

    told, at, *options = sys.argv[2:]
    here, at = jax.process_index(), int(at)
    trainer = Trainer(load_config(sys.argv[1], options))
    batches, step, evaluate = trainer.batches, trainer._train_step, trainer.evaluate
    begun = 0

    def slow_data(start):
        for batch in batches(start):
            time.sleep(0.3 if here == 1 else 0)
            yield batch

    def slow_evaluation():
        time.sleep(1 if here == 0 else 0)
        return evaluate()

    def counted(state, batch):
        global begun
        begun += 1
        if here == int(told) and begun == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch)

    trainer.batches, trainer._train_step, trainer.evaluate = slow_data, counted, slow_evaluation
    done = trainer.fit()
    print(done, trainer.step, begun)
"""


@pytest.mark.long
@pytest.mark.parametrize(("told", "at"), [(0, 4), (1, 5)])
def test_a_run_of_several_processes_stops_with_what_is_in_flight(tmp_path, told, at):
    data = write_data(tmp_path / "data")
    options = [
        *TINY, f"--data.train={data}", f"--data.validation={data}", f"--train.output={tmp_path / 'run'}",
        "--train.steps=40", "--train.eval_every=2", "--checkpoint.every=2", "--train.preemption_notices=false",
    ]  # fmt: skip
    outputs = launch.run(
        TRAIN, ROOT / "configs/tiny.yaml", told, at, *options, devices_each=4, device_order="interleaved"
    )
    ends = [output.splitlines()[-1].split() for output in outputs]
    assert ends[0] == ends[1], "processes stopped after different steps"
    done, step, begun = ends[0]
    assert (done, step) == ("False", begun)
    assert at <= int(step) <= at + 1, "more than the step in flight and one queued behind it were done"
    assert (tmp_path / f"run/checkpoints/{step}").is_dir()
