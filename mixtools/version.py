"""The version: of the package, of what a journal fits, and in every document."""

__version__ = "0.1.0"
