"""Products of a few tokens with weights as they are stored, on a GPU: what a step of decoding is made of.

    stored tensors ─► planes.py: repacked once, so that threads load 16 bytes side by side
                          │
    library.py: torch.ops.mixtools.gpu_* ─► launch.py: sizes ─► gemv.py, one text for all ─► decoders.py, one each
                                                                routing.py, attend.py: what stands between products

Nothing here imports Triton until a kernel is asked for.
"""
