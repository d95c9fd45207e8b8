"""Linear algebra of one weight matrix: its spectrum, what of it is noise, and the matrix rebuilt from a part of it.

gram.py      W Wᵀ or WᵀW on the short side, in fp64 or as good as
eigen.py     eigenvalues first; vectors afterwards, and only those that are asked for
spectrum.py  singular values, projection, factors
bulk.py      Marchenko-Pastur, Gavish-Donoho, LaserRMT: thresholds estimated from the bulk
rules.py     a rank from a rule
output.py    what each rank costs at the layer's output
weighted.py  the best approximation in that output's norm
ldl.py       what rounding a column asks of those behind it
"""
