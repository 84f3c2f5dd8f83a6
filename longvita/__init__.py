"""Long-VITA: a vision-language model for a million tokens, its trainer and its inference, built on the ops of `longvita_kernels`.

    model, processor = longvita.load("runs/demo/stage4")
    for piece in longvita.generate(model, processor, [{"role": "user", "content": "Hello"}], max_new_tokens=64):
        print(piece, end="")

Importing this package is cheap: torch is imported when the first thing that needs it is touched.
"""

import importlib

__version__ = "0.1.0"

# name → module that defines it
_LAZY = {
    "LongVitaConfig": "longvita.config",
    "presets": "longvita.config",
    "LongVita": "longvita.model.long_vita",
    "Batch": "longvita.model.batch",
    "load": "longvita.model.loading",
    "generate": "longvita.infer.engine",
    "generate_ids": "longvita.infer.engine",
}
# subpackage → submodules that an attribute access brings along (`longvita.train.recipes.stage1()`)
_SUBPACKAGES = {"model": (), "data": (), "train": ("recipes",), "infer": (), "eval": (), "cli": ()}

__all__ = sorted([*_LAZY, *_SUBPACKAGES])


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBPACKAGES:
        package = importlib.import_module(f"longvita.{name}")
        for submodule in _SUBPACKAGES[name]:
            importlib.import_module(f"longvita.{name}.{submodule}")
        return package
    raise AttributeError(f"module 'longvita' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return [*globals(), *__all__]
