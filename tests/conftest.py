"""What every test shares. JAX must see 8 CPU devices, so this runs before it is imported."""

import os
from pathlib import Path

from tests import commands

os.environ.update(commands.environment(devices=8))

import pytest
from jaxtyping import install_import_hook

# Shapes and types in signatures are checked whenever a test calls the function.
install_import_hook(["grit_jax.model", "grit_jax.losses", "grit_jax.inference.decode"], "beartype.beartype")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the checkout."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder `shared` is not beside the checkout")
    return folder
