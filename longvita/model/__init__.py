"""The model: vision tower, projector and decoder over packed tokens, its cache, and reading and writing its weights."""
