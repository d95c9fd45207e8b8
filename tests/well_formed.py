"""torch's own check of an operation: schema, shape function, what it changes and what it returns."""

from torch import library

opcheck = library.opcheck
