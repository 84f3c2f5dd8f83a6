"""Attention over documents spread over processes: `plan_context_parallel` says who owns and who needs what, `ring_attention` does it."""
