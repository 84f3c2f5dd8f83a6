"""Training: recipes, optimizer groups, the step loop, atomic checkpoints and metrics.

`recipes` imports no torch, so that commands can print a recipe at once; import the other modules by name when they are needed.
"""
