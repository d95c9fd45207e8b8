"""Disk layouts: name tables, detection, readers."""
