"""Texts and ids: tokenizers and conversations."""
