"""The CUDA extension: `build` compiles it; `load` finds it, checks that it matches this environment and loads it.

setup.py loads `build` and its imports by their paths, before the package can be imported. Those files use relative
imports and the standard library only; this file is not executed then.
"""

from fastattn.extension.load import ADVICE, State, module, state

__all__ = ["ADVICE", "State", "module", "state"]
