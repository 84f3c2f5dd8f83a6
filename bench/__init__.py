"""Speed and memory of the ops against the machine's own ceilings and every in-box peer. `python -m bench --help`."""
