"""mixtools: read, transform, check and publish Mixtral checkpoints in bounded memory."""

__version__ = "0.1.0"
