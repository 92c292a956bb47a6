"""GRIT in JAX: one transformer that embeds and generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from grit_jax.inference.model import GritModel
    from grit_jax.train.loop import Trainer

__all__ = ["GritModel", "Trainer", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line must start without JAX.
    if name == "GritModel":
        from grit_jax.inference.model import GritModel

        return GritModel
    if name == "Trainer":
        from grit_jax.train.loop import Trainer

        return Trainer
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("grit-jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
