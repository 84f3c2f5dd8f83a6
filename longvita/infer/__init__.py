"""Inference: prefill in chunks, decoding of several conversations at once, sampling, streaming."""
