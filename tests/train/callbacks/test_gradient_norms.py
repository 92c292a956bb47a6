import jax.numpy as jnp

from grit_jax.train.callbacks.gradient_norms import GradientNorms
from tests.train.callbacks import made_up


def test_gradient_norms_belong_to_the_step_that_they_are_measured_for(tmp_path):
    seen = []

    def norm(trainable, frozen, part):
        seen.append(list(part))
        return jnp.asarray(6.0 if "embedding" in part else 2.0)

    lines = made_up.run(tmp_path, GradientNorms(5, norm)).lines
    assert [step for step, line in lines.items() if "grad_norm/ratio" in line] == [5, 10]
    assert [lines[5][f"grad_norm/{name}"] for name in ("embedding", "generative", "ratio")] == [6, 2, 3]
    assert seen == [["embedding"], ["generative"]] * 2
