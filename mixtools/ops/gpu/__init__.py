"""Kernels for a GPU, first of all products of a few tokens with weights as they are stored: a step of decoding.

    stored tensors ─► planes.py: repacked once, so that threads load 16 bytes side by side
                          │
    library.py: torch.ops.mixtools.gpu_* ─► launch.py: sizes ─► gemv.py, one text for all ─► decoders.py, one each
                                                                routing.py, attend.py: what stands between products

Beside them what prepares such weights there: encoding.py (GGUF's blocks), rounding.py and round.py (second-order
rounding), symmetric.py and tridiagonal.py (eigenproblems).

Nothing here imports Triton until a kernel is asked for.
"""
