"""MemoryReader: the test double beside the real readers, and a random model of any shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..config import MixtralConfig
from ..errors import LayoutError
from ..names import Slot
from ..storage.dtypes import DType
from .reader import Spec

_NORM_SPREAD = 0.1


class MemoryReader:
    """A Reader (layouts/reader.py) over tensors that are already in memory, in canonical form.

    Raises LayoutError when the tensors are not the model's: one missing, or one too many.
    """

    def __init__(self, config: MixtralConfig, tensors: Mapping[Slot, torch.Tensor]) -> None:
        expected = set(config.slots())
        for what, slots in (("missing", expected - tensors.keys()), ("unknown", tensors.keys() - expected)):
            if slots:
                raise LayoutError(f"{len(slots)} tensors are {what}, of which this is one", tensor=min(map(str, slots)))
        self._config = config
        self._tensors = dict(tensors)

    @property
    def config(self) -> MixtralConfig:
        return self._config

    def slots(self) -> Iterator[Slot]:
        return self._config.slots()

    def spec(self, slot: Slot) -> Spec:
        tensor = self._tensors[slot]
        return Spec(tuple(tensor.shape), DType.of(tensor.dtype))

    def read(self, slot: Slot) -> torch.Tensor:
        """A copy: the caller owns what it reads, here as from a file."""
        return self._tensors[slot].detach().cpu().clone(memory_format=torch.contiguous_format)


def random_reader(config: MixtralConfig, seed: int, dtype: torch.dtype = torch.float32) -> MemoryReader:
    """A model of `config`'s shape with normal weights, scaled so that activations neither fade nor grow.

    The same seed gives the same weights, up to the rounding to `dtype`.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for slot in config.slots():
        shape = config.shape(slot.role)
        noise = torch.randn(shape, generator=generator)
        # a norm's weights lie around one; a matrix keeps the variance of its input
        weight = 1 + _NORM_SPREAD * noise if len(shape) == 1 else noise * shape[1] ** -0.5
        tensors[slot] = weight.to(dtype)
    return MemoryReader(config, tensors)
