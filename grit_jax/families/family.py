"""A model family as tables in Hugging Face's words; needs no JAX."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter and the stored tensors that make it up.

    Attributes:
      name: Name in the safetensors file; `{layer}` and `{expert}` stand for the indices of the parameter's first dims.
      path: Path of the parameter.
      in_dims: Number of input dims of a matrix product: torch stores [out, in], flattened, for a parameter [in...,
        out...]. None for a tensor stored as it is, 0 for a bias.
    """

    name: str
    path: tuple[str, ...]
    in_dims: int | None = None

    @property
    def module(self) -> str:
        """Name of its module in the layer, such as `q_proj`."""
        return self.name.split(".")[-2]

    def stored(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name of each stored tensor and its index in a parameter of `shape`."""
        keys = [key for key in ("layer", "expert") if f"{{{key}}}" in self.name]
        for index in itertools.product(*map(range, shape[: len(keys)])):
            yield self.name.format(**dict(zip(keys, index, strict=True))), index

    def num_stored(self, shape: tuple[int, ...]) -> int:
        """Number of stored tensors of a parameter of `shape`."""
        return math.prod(shape[: self.name.count("{")])

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each stored tensor of a parameter of `shape`."""
        shape = shape[self.name.count("{") :]
        if self.in_dims is None:
            return shape
        fan_out = math.prod(shape[self.in_dims :])
        return (fan_out, math.prod(shape[: self.in_dims])) if self.in_dims else (fan_out,)

    def to_stored(self, value: Any) -> Any:
        """One stored tensor from its part of the parameter, NumPy or JAX."""
        if self.in_dims is None:
            return value
        return value.reshape(math.prod(value.shape[: self.in_dims]), -1).T if self.in_dims else value.reshape(-1)

    def from_stored(self, stored: Any, shape: tuple[int, ...]) -> Any:
        """The inverse of `to_stored`, for a parameter of `shape`."""
        return (stored.T if self.in_dims else stored).reshape(shape[self.name.count("{") :])


@dataclasses.dataclass(frozen=True)
class Family:
    """How Hugging Face stores the decoders of one `model_type`. Fields are those of `TransformerConfig`.

    Attributes:
      model_class: Class of transformers that opens the folder.
      tensors: Every parameter, in the order of writing.
      fixed: Fields that the family determines.
      keys: Fields and their keys in config.json, besides those that all families share. An absent key has the field's
        value in `defaults`; families without the field refuse the key.
      defaults: Values of absent keys where they differ from those of `TransformerConfig`.
      aliases: Fields and their second keys, which must agree with the first ones.
      constants: Keys always written with the same value.
      activation: Key of the activation, and its value if absent.
      windows: Which layers have the sliding window: `none`, `all`, the last ones if a switch is on (`optional`), or a
        pattern (`layers`).
      window_period: n if every n-th layer of a pattern sees everything, unless `layer_types` says otherwise; or n's key
        and default.
      remote_code: Whether `modeling_grit.py` makes old versions of transformers embed with this family.
      eager: Whether transformers needs eager attention.
      vllm_gritlm: Whether vLLM's GritLM class runs it.
      vllm_is_causal: Whether vLLM honours `is_causal`.
    """

    model_class: str
    tensors: tuple[Tensor, ...]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation: tuple[str, str] = ("hidden_act", "silu")
    windows: Literal["none", "all", "optional", "layers"] = "none"
    window_period: int | tuple[str, int] = 1
    remote_code: bool = False
    eager: bool = False
    vllm_gritlm: bool = False
    vllm_is_causal: bool = True

    @property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """Paths of a layer's linear modules by their names, such as `q_proj`: those that PEFT adapts."""
        return {
            row.module: row.path[1:-1]
            for row in self.tensors
            if row.path[0] == "layers" and row.in_dims and row.path[-1] == "kernel" and "router" not in row.path
        }

    @property
    def feature_keys(self) -> set[str]:
        """Keys of config.json that this family has but not all families do."""
        windows = set() if self.windows == "none" else {"sliding_window"}
        switch = {"use_sliding_window"} if self.windows == "optional" else set()
        period = {self.window_period[0]} if isinstance(self.window_period, tuple) else set()
        return {*self.keys.values(), *windows, *switch, *period}
