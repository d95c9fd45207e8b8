"""Rotary positions: how far each pair of coordinates turns from one position to the next, plain and stretched.

    type      the idea                                                            source
    linear    all turn `factor` times slower                                      Chen and others, arxiv 2306.15595
    dynamic   the base grows with the text, once it is longer than the training   bloc97 and emozilla, reddit, 2023
    yarn      slow ones turn slower, fast ones do not; cosine and sine grow       Peng and others, arxiv 2309.00071
    llama3    as yarn, told by wavelength                                         Llama team, arxiv 2407.21783

All in fp32, in the order of operations of transformers: at far positions another order gives other angles, and the
model runs as others run it. scaling.RopeScaling names the fields.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import MixtralConfig
from ..scaling import RopeScaling


def frequencies(config: MixtralConfig, device: torch.device, reach: Tensor | None = None) -> Tensor:
    """Radians a position, fp32, [hd/2]; of the type dynamic [B, hd/2], one row for each length in `reach` [B].

    `reach`: how many positions the text has that these turn, at least 1; None: no more than the model was trained on.
    """
    scaling, base = config.rope_scaling, config.rope_theta
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim  # [hd/2]
    if scaling is None:
        return 1.0 / base**exponent
    if scaling.type == "linear":
        return 1.0 / base**exponent / scaling.factor
    if scaling.type == "dynamic":
        return _dynamic(config, scaling, exponent, reach)
    if scaling.type == "yarn":
        return _yarn(config, scaling, exponent)
    return _llama3(scaling, 1.0 / base**exponent)


def gain(scaling: RopeScaling | None) -> float:
    """What cosine and sine are multiplied by: yarn's attention factor, 1 elsewhere."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _dynamic(config: MixtralConfig, scaling: RopeScaling, exponent: Tensor, reach: Tensor | None) -> Tensor:
    plain = 1.0 / config.rope_theta**exponent
    trained, factor = config.max_position_embeddings, scaling.factor
    if reach is None or not bool((reach > trained).any()):
        return plain
    growth = (factor * reach.clamp(min=trained) / trained - (factor - 1)) ** (config.head_dim / (config.head_dim - 2))
    stretched = 1.0 / (config.rope_theta * growth[:, None]) ** exponent  # [B, hd/2]
    return torch.where(reach[:, None] > trained, stretched, plain)


def _yarn(config: MixtralConfig, scaling: RopeScaling, exponent: Tensor) -> Tensor:
    assert scaling.original_max_position_embeddings and scaling.beta_fast and scaling.beta_slow
    length, size = scaling.original_max_position_embeddings, config.head_dim

    def place(turns: float) -> float:
        """The coordinate, a real number, that turns so often over the length of the training."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(size // 2, device=exponent.device, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    period = config.rope_theta**exponent
    return 1.0 / (scaling.factor * period) * (1 - kept) + 1.0 / period * kept


def _llama3(scaling: RopeScaling, plain: Tensor) -> Tensor:
    length, slow, fast = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert length and slow and fast
    wavelength = 2 * math.pi / plain
    share = (length / wavelength - slow) / (fast - slow)  # of what stays
    between = (1 - share) * plain / scaling.factor + share * plain
    stretched = torch.where(wavelength > length / slow, plain / scaling.factor, between)
    return torch.where(wavelength < length / fast, plain, stretched)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
