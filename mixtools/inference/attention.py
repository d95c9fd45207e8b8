"""Between positions: where the tokens of a pass stand in their sequences, which of them each may see, and attention.

Letters in shapes as in model.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import MixtralConfig
from . import rope

BAND_ROWS = 512  # that attend at a time behind a sliding window
_PLANLESS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Span(NamedTuple):
    """The positions of one pass: shared by all layers, made once by `span`."""

    cos: Tensor  # [B or 1, 1, T, hd/2], fp32
    sin: Tensor
    start: int  # columns of the cache that are filled before this pass
    mask: Tensor | None  # [B, 1, T, S] bool, True = may look; None = no padding, every column in use
    band: Band | None = None  # instead of the mask, where a sliding window hides columns


class Band(NamedTuple):
    """A sliding window: the token at column c sees the columns above c - `window`, of its text, up to itself."""

    window: int
    padding: Tensor | None  # [B]


def span(
    config: MixtralConfig,
    length: int,
    device: torch.device,
    start: int = 0,
    padding: Tensor | None = None,
    *,
    prompt: int = 0,
) -> Span:
    """Positions start .. start+length of sequences whose first `padding` [B] columns are not text.

    Positions count from the first column that is text. `prompt`: columns of the whole prompt of which this pass may be
    a part, since some rotations depend on it (rope.py). Angles are fp32 products, as in every loader in use: at far
    positions these differ from exact ones, and the model runs as others run it.
    """
    left = torch.zeros(1, device=device, dtype=torch.long) if padding is None else padding  # [B or 1]
    frequency = rope.frequencies(config, device, max(start + length, prompt) - left)  # [hd/2] or [B or 1, hd/2]
    row = torch.arange(start, start + length, device=device)[None]  # [1, T]
    col = torch.arange(start + length, device=device)  # [S]
    mask = band = None
    if config.sliding_window is not None and config.sliding_window < start + length:
        band = Band(config.sliding_window, padding)
    elif padding is not None:
        text = (col[None, None] <= row[..., None]) & (col[None, None] >= padding[:, None, None])
        itself = col[None, None] == row[..., None]  # a padding row that sees nothing would be NaN
        mask = (text | itself)[:, None]
    elif start and length > 1:
        mask = (col[None] <= row[0, :, None])[None, None]
    return Span(*turns(config, row, frequency, padding), start, mask, band)


def turns(config: MixtralConfig, row: Tensor, frequency: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, 1, T, hd/2] of the columns `row` [1, T], by rope.frequencies."""
    position = row if padding is None else (row - padding[:, None]).clamp(min=0)
    angle = position.float()[:, None, :, None] * (frequency if frequency.dim() == 1 else frequency[:, None, None])
    cos, sin, gain = angle.cos(), angle.sin(), rope.gain(config.rope_scaling)
    return (cos, sin) if gain == 1 else (cos * gain, sin * gain)


def rotate(x: Tensor, where: Span) -> Tensor:
    """Rotary positions on x [B, heads, T, hd]: its halves are the two coordinates (Hugging Face order)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * where.cos - second * where.sin, second * where.cos + first * where.sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


class LayerCache:
    """Keys and values of one layer: [B, G, capacity, hd] each."""

    def __init__(self, config: MixtralConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def append(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Put [B, G, T, hd] at column `start`; all columns so far, [B, G, start+T, hd]."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences only."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def attend(q: Tensor, k: Tensor, v: Tensor, where: Span) -> Tensor:
    """softmax(q k' / sqrt(hd)) v: q [B, H, T, hd], k and v [B, G, S, hd] -> [B, H, T, hd]."""
    if where.band is None:
        return _attend(q, k, v, where.mask)
    # a run of rows at a time sees a run of columns: the work, and the masks, grow with the window and not with the text
    batch, heads, length, size = q.shape
    out = torch.empty(batch, length, heads, size, device=q.device, dtype=q.dtype).transpose(1, 2)
    for at in range(0, length, BAND_ROWS):
        rows = min(BAND_ROWS, length - at)
        first, mask = _visible(where.band, where.start + at, rows, q.device)
        last = where.start + at + rows
        out[:, :, at : at + rows] = _attend(q[:, :, at : at + rows], k[:, :, first:last], v[:, :, first:last], mask)
    return out


def _visible(band: Band, start: int, rows: int, device: torch.device) -> tuple[int, Tensor | None]:
    """For the rows at columns start .. start+rows: the first column that one of them sees, and their mask from there.

    The mask is [B or 1, 1, rows, columns]; None where every row sees all of these, or all but what comes after it.
    """
    first = max(0, start - band.window + 1)
    if band.padding is None and (rows == 1 or (start == 0 and rows <= band.window)):
        return first, None
    row = torch.arange(start, start + rows, device=device)[:, None]
    col = torch.arange(first, start + rows, device=device)[None]
    seen = ((col <= row) & (col > row - band.window))[None]
    if band.padding is not None:
        seen = (seen & (col[None] >= band.padding[:, None, None])) | (col == row)  # as in `span`
    return first, seen[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `attend`. Without a mask the last T of the S columns are the rows' own, if T > 1 the first of them too."""
    batch, heads, length, size = q.shape
    if length == 1:
        # the H/G queries of a key-value head as rows of one product: in bf16 on a CPU 12 times faster than enable_gqa
        q = q.reshape(batch, k.shape[1], heads // k.shape[1], size)
        with _kernels(q.device):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(batch, heads, 1, size)
    if q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # with shared heads and a mask, or in fp32, torch would make all scores at once
        k, v = (one.repeat_interleave(heads // one.shape[1], 1) for one in (k, v))
    with _kernels(q.device):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] < heads
        )


def _kernels(device: torch.device) -> AbstractContextManager[None]:
    """On a GPU without cuDNN's, which plans for half a second at each new length."""
    return sdpa_kernel(_PLANLESS) if device.type == "cuda" else nullcontext()
