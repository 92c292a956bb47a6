"""What every test shares. JAX must see 8 CPU devices, so this runs before it is imported."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # an installed libtpu otherwise looks for a TPU host's metadata
# Small programs take longer to optimise than to run.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import pytest
from jaxtyping import install_import_hook

# Shapes and types in signatures are checked whenever a test calls the function.
install_import_hook(["grit_jax.model", "grit_jax.losses", "grit_jax.contrastive"], "beartype.beartype")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the checkout."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder `shared` is not beside the checkout")
    return folder
