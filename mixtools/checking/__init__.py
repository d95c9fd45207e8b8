"""An output against its source: every byte, perplexity, divergence, continuations, gates, the verdict and its page."""
