"""Methods: what changes a model's weights, a folder each.

    METHODS ─► mixtools NAME SRC OUT --options      a command
            ├► - do: NAME                           a recipe's step
            └► mixtools.NAME(source, out, ...)      the Python API

A new method is a folder here and its line below. In the folder: the pure part (tensors in, formats.Packed out, typed
frozen options), and a verb: a function whose parameters carry their options (verbs.py) and that plans a job (job.py).
"""

from __future__ import annotations

from ..verbs import Entry

METHODS = {
    "laser": Entry("methods.laser.verbs:laser", "methods.laser.consistent:expect_consistent"),
    "spectrum": Entry("methods.laser.verbs:spectrum"),
    "imatrix": Entry("methods.quantize.imatrix:imatrix"),
    "quantize": Entry("methods.quantize.verbs:quantize", "methods.quantize.verbs:preflight"),
}
