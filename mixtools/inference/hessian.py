"""Second moments of what a linear reads: Σ x xᵀ and Σ |x|, in fp32, however many tokens come.

For methods that weigh an error by what reaches a matrix. A product of two 16-bit values is exact in fp32, and sums are
fp32: on a GPU the matrix units for 16 bits give those at once. Values of 32 bits are never multiplied by less (TF32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TensorError
from ..linalg.few import Few
from ..names import Slot
from .products import fp32_from_16_bits

PANEL = 2048  # columns of a product; what lies above the diagonal is mirrored, not computed


class Gram:
    """Σ x xᵀ over rows x [n, width], and Σ |x|; see `settle`. Its lower triangle alone is summed."""

    def __init__(self, width: int, device: torch.device | str = "cpu", *, block: int | None = None) -> None:
        """`block`: keep only so many columns' products with each other; None keeps all."""
        self.width, self.block = width, min(block or width, width)
        self.starts = range(0, width, self.block)
        self.blocks = [torch.zeros((min(self.block, width - at),) * 2, device=device) for at in self.starts]
        self.magnitude = torch.zeros(width, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Rows [n, width] of any dtype."""
        wide = x.float()
        self.tokens += len(x)
        self.magnitude += wide.abs().sum(0)
        factors = x if fp32_from_16_bits(x) else wide
        for number, total in enumerate(self.blocks):
            part = factors[:, number * self.block : number * self.block + len(total)]
            for at in range(0, len(total), PANEL):
                end = min(at + PANEL, len(total))
                left, right, into = part[:, at:].T, part[:, at:end], total[at:, at:end]
                if factors is wide:
                    into.addmm_(left, right)
                else:
                    into += torch.mm(left, right, out_dtype=torch.float32)

    def settle(self, slot: Slot) -> None:
        """Mirror what was summed, so that `blocks` are whole. Raises TensorError for inputs that are not finite."""
        for number, total in enumerate(self.blocks):
            _expect_finite(total.diagonal(), number * self.block, slot)
            for at in range(0, len(total), PANEL):
                end = min(at + PANEL, len(total))
                total[at:end, end:] = total[end:, at:end].T
                square = total[at:end, at:end]
                square.copy_(square.tril() + square.tril(-1).T)


class Rows:
    """As a Gram, of few rows, which are kept as they are: `count` of them will come."""

    def __init__(self, width: int, count: int, device: torch.device | str = "cpu") -> None:
        self.width, self.starts = width, range(0, width, width)
        self.magnitude = torch.zeros(width, device=device)
        self.tokens = 0
        self._rows = torch.empty(count, width, device=device)
        self.blocks: list[Few] = []

    def add(self, x: Tensor) -> None:
        """Rows [n, width] of any dtype."""
        wide = self._rows[self.tokens : self.tokens + len(x)].copy_(x)
        self.tokens += len(x)
        self.magnitude += wide.abs().sum(0)

    def settle(self, slot: Slot) -> None:
        """Raises TensorError for inputs that are not finite, as a Gram's squares would not be."""
        few = Few(self._rows)
        _expect_finite(few.diagonal(), 0, slot)
        self.blocks = [few]


def _expect_finite(squares: Tensor, first: int, slot: Slot) -> None:
    if bool(torch.isfinite(squares).all()):
        return
    column = int((~torch.isfinite(squares)).nonzero()[0]) + first
    raise TensorError(
        f"its inputs are not finite in column {column}: the weights before it hold NaN or Inf "
        "(`mixtools inspect --verify` finds them), or overflow in this dtype", tensor=slot,
    )  # fmt: skip


def gram_bytes(width: int, block: int | None = None) -> int:
    """What a Gram takes."""
    block = min(block or width, width)
    return 4 * (width * block + width)
