"""Bytes on disk: lazy reading by offset, atomic planned writing, journal."""
