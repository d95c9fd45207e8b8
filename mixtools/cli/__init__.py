"""The command line: a skin over the verbs; the only place that prints."""
