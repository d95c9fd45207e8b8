"""Models by name: from the Hub, or where they lie."""
