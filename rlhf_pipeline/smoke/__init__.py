"""A recipe proven without a GPU: every stage for two steps, on a tiny checkpoint of its own model."""
