"""Pipelines as files."""
