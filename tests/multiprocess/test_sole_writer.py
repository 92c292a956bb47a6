"""The run folder's lock in a job of two processes."""

from grit_jax.runs.lock import WriterLock
from tests.multiprocess.launch import run

SCRIPT = """
    import sys
    import jax
    from grit_jax.errors import InputError
    from grit_jax.parallel.sole_writer import refuse_other_writers, sole_writer
    from grit_jax.runs.lock import read_writer

    free, taken = sys.argv[1:]
    with sole_writer(free) as writer:
        writer.check()
        writer.confirm()
        print(jax.process_index() == 1 or read_writer(free) is not None)
    for refused in (refuse_other_writers, lambda folder: sole_writer(folder).__enter__()):
        try:
            refused(taken)
        except InputError as error:
            print("is being written by process" in str(error))
"""


def test_process_0_holds_the_lock_and_a_refusal_reaches_every_process(tmp_path):
    held = WriterLock(tmp_path / "taken")
    try:
        outputs = run(SCRIPT, tmp_path / "free", tmp_path / "taken", devices_each=1, timeout=120)
    finally:
        held.release()
    assert [output.split() for output in outputs] == [["True"] * 3] * 2
