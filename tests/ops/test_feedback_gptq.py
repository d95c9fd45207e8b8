"""Second-order rounding of a whole matrix, block by block: the codes are those of GPTQ, and of coordinate descent.

Oracles: the paper's own formulation, with the Cholesky factor of the inverse Hessian, in float64; what auto-gptq chose
(tests/golden/rounding.md); and the error itself, computed for each level that a weight could have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mixtools.ops.feedback import Block, round_block

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "rounding.safetensors")


def upper_factor(hessian: np.ndarray) -> np.ndarray:
    """U, unit upper triangular, of H = U D Uᵀ."""
    root = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return root / np.diag(root)


def quantize(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, mins: np.ndarray, width: int) -> np.ndarray:
    """Codes [rows, columns] of range(16), in blocks of `width` columns; scales and mins [rows, columns]."""
    factor = torch.from_numpy(upper_factor(hessian).astype(np.float32))
    weights, scales, mins = (
        torch.from_numpy(one.astype(np.float32)).t().contiguous() for one in (weight, scales, mins)
    )
    targets, errors = weights.clone(), torch.zeros_like(weights)
    codes = torch.zeros(weights.shape, dtype=torch.uint8)
    for first in range(0, len(weights), width):
        at = slice(first, first + width)
        lines = torch.arange(first, min(first + width, len(weights)), dtype=torch.int32)
        block = Block(targets[at], weights[at], errors[at], codes[at], scales, mins, lines, factor[at, at])
        round_block(block, range(16))
        targets[first + width :] += factor[at, first + width :].t() @ errors[at]
    return codes.t().numpy()


def gptq(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, mins: np.ndarray) -> tuple[np.ndarray, float]:
    """The same from the paper's algorithm 1, and how near a value came to the middle between two levels."""
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    weight, codes, nearest = weight.astype(np.float64), np.zeros(weight.shape, np.uint8), 1.0
    for i in range(weight.shape[1]):
        wanted = (weight[:, i] - mins[:, i]) / scales[:, i]
        nearest = min(nearest, float(np.abs(wanted - np.floor(wanted) - 0.5).min()))
        codes[:, i] = np.clip(np.rint(wanted), 0, 15)
        error = (weight[:, i] - scales[:, i] * codes[:, i] - mins[:, i]) / inverse[i, i]
        weight[:, i + 1 :] -= np.outer(error, inverse[i, i + 1 :])
    return codes, nearest


def hessian_of(columns: int, random: np.random.Generator) -> np.ndarray:
    """Of inputs that hang together, some of them much larger than others; damped."""
    inputs = random.standard_normal((4 * columns, columns)) @ random.standard_normal((columns, columns))
    inputs *= random.uniform(0.1, 1, columns)
    hessian = inputs.T @ inputs
    return hessian + 0.02 * np.diag(hessian).mean() * np.eye(columns)


@pytest.mark.parametrize("width", [1, 5, 16, 24, 60])
def test_codes_are_those_of_the_paper(isa, width):
    """Groups that begin inside a block, and blocks inside a group.

    There others fed errors back to the wrong columns (mlx-lm's issue 1878) or not at all (FP-Quant's issue 7).
    """
    random = np.random.default_rng(8)
    weight, hessian = random.standard_normal((70, 60)), hessian_of(60, random)
    scales = random.uniform(0.1, 0.3, (70, 6)).repeat(10, axis=1).astype(np.float32)
    mins = -scales * random.uniform(5, 10, (70, 6)).repeat(10, axis=1).astype(np.float32)
    weight = weight.astype(np.float32)
    expected, nearest = gptq(weight, hessian, scales, mins)
    assert nearest > 1e-4, "too near for a comparison between float32 and float64"
    np.testing.assert_array_equal(quantize(weight, hessian, scales, mins, width), expected)
    plain = np.clip(np.rint((weight - mins) / scales), 0, 15)
    assert np.mean(plain != expected) > 0.2


@pytest.mark.parametrize("name", ["sym", "asym.order"])
@pytest.mark.parametrize("width", [7, 32, 96])
def test_codes_are_those_of_auto_gptq(isa, name, width):
    weight, hessian, scales, zeros, codes = (
        GOLDEN[f"{name}/{part}"] for part in ("weight", "hessian", "scales", "zeros", "codes")
    )
    hessian = hessian.astype(np.float64)
    strength = np.diag(hessian)
    hessian = hessian + 0.01 * strength.mean() * np.eye(96)
    order = np.argsort(-strength) if name == "asym.order" else np.arange(96)
    scales, mins = scales[:, order // 32], -(scales * zeros)[:, order // 32]
    found = quantize(weight[:, order], hessian[np.ix_(order, order)], scales, mins, width)
    np.testing.assert_array_equal(found, codes[:, order])


def test_coordinate_descent(isa):
    """From the errors of rounding to nearest: each code in turn is the best of all while the others stay."""
    random = np.random.default_rng(5)
    weight, hessian = random.standard_normal((20, 24)).astype(np.float32), hessian_of(24, random)
    scale, feedback = np.float32(0.4), (hessian / np.diag(hessian)).astype(np.float32)
    codes = np.clip(np.rint(weight / scale), -8, 7)
    errors = torch.from_numpy(weight - scale * codes.astype(np.float32)).t().contiguous()
    weights = torch.from_numpy(weight).t().contiguous()
    expected, losses = weight.astype(np.float64) - scale * codes, []
    for _ in range(3):
        targets = weights + torch.from_numpy(feedback - np.eye(24, dtype=np.float32)).t() @ errors
        ones = torch.ones(1, 20)
        found = torch.zeros(24, 20, dtype=torch.uint8)
        group_of, factor = torch.zeros(24, dtype=torch.int32), torch.from_numpy(feedback)
        block = Block(targets, weights, errors, found, ones * float(scale), ones * 0, group_of, factor)
        round_block(block, range(-8, 8))
        for col in range(24):
            tried = np.repeat(expected[None], 16, axis=0)  # [levels, rows, columns]
            tried[:, :, col] = weight[:, col] - scale * np.arange(-8.0, 8)[:, None]
            best = np.einsum("lri,ij,lrj->lr", tried, hessian, tried).argmin(axis=0)
            np.testing.assert_array_equal(found[col].numpy(), best)
            expected[:, col] = weight[:, col] - scale * (best - 8.0)
        losses.append(np.einsum("ri,ij,rj->", expected, hessian, expected))
    assert losses[0] > losses[1] >= losses[2]
