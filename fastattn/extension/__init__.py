"""The CUDA extension: `build` compiles it; `load` finds it, checks that it matches this environment and loads it.

setup.py loads `build` and what that imports by their path, before the package can be imported: those files import each
other relatively, and otherwise the standard library only. This file is not run then.
"""

from fastattn.extension.load import ADVICE, State, module, state

__all__ = ["ADVICE", "State", "module", "state"]
