"""The CUDA extension: `build` makes it, `load` finds it, checks that it fits and loads it.

setup.py loads `build` and what that imports by their path, before the package can be imported: those files import each
other relatively, and the standard library alone. This file is not run then.
"""

from fastattn.extension.load import ADVICE, State, module, state

__all__ = ["ADVICE", "State", "module", "state"]
