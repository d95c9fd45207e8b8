"""Quantization: which values a weight may keep, and what tells how much each matters."""
