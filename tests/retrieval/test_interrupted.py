"""However often `grit-jax index` is killed, the store ends with the bytes of an undisturbed one."""

import random
import shutil
import signal
import time

import jax
import pytest

from grit_jax import GritModel
from tests.commands import start
from tests.retrieval import killing
from tests.retrieval.stores import content, index, save_model, write_corpus

KINDS = {
    "vectors": {"dtype": "int8", "shard_rows": 4},
    "vectors, keys and values": {"caches": "int8", "cache_form": "second", "shard_rows": 4},
}


class Undisturbed:
    """A store that was made and then grown, by itself; how many moments and seconds making it took."""

    def __init__(self, folder, options):
        self.options = options
        self.model = save_model(folder / "model")
        self.loaded = GritModel.load(self.model, devices=jax.devices()[:2])
        self.corpora = [[write_corpus(folder / "a.jsonl")], [write_corpus(folder / "b.jsonl", range(20, 40))]]
        self.begun, self.grown = folder / "begun", folder / "grown"
        started = time.monotonic()
        done = killing.run(0, *self.command(0, self.begun))
        self.seconds = time.monotonic() - started
        assert done.returncode == 0, done.stderr
        self.moments = -int(done.stderr.split()[-1])
        shutil.copytree(self.begun, self.grown)
        self.finish(1, self.grown)

    def command(self, step, store):
        """Makes the store, or makes it grow."""
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self.options.items()]
        return ["index", self.model, *self.corpora[step], store, *options]

    def finish(self, step, store):
        """The same command in this process, with as many devices."""
        index(store, self.loaded, *self.corpora[step], name=str(self.model), **self.options)


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request, tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("index"), KINDS[request.param])


def trial(undisturbed, store, seed, *, kills):
    """Kills a command that makes a store or makes it grow, at a moment of its writing or whenever."""
    draw = random.Random(seed)
    step = draw.randrange(2)
    if step:
        shutil.copytree(undisturbed.begun, store)
    for _ in range(kills):
        if draw.random() < 0.7:
            killed = killing.run(draw.randint(1, undisturbed.moments), *undisturbed.command(step, store))
            assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr  # fewer moments may be left
        else:
            process = start(*undisturbed.command(step, store), devices=2)
            time.sleep(draw.uniform(0.3, 1) * undisturbed.seconds)
            process.kill()
            process.communicate()
    undisturbed.finish(step, store)
    assert content(store) == content((undisturbed.begun, undisturbed.grown)[step])


@pytest.mark.parametrize("seed", range(3))
def test_a_store_that_was_killed_while_it_was_made_has_the_bytes_of_one_that_was_not(undisturbed, tmp_path, seed):
    trial(undisturbed, tmp_path / "store", seed, kills=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 140))
def test_forty_stores_that_were_killed_again_and_again_have_the_bytes_of_one_that_was_not(undisturbed, tmp_path, seed):
    trial(undisturbed, tmp_path / "store", seed, kills=1 + seed % 3)
