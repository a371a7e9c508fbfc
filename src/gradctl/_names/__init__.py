"""Names (FQNs) of parameters in a program that never told us its model.

Three looks, each only for what the one before left unnamed:

1. *registration*: torch's global registration hooks remember, weakly, every module that was given a parameter or a
   submodule; about 3 us each. Copied and unpickled modules pass them by, unless they hang below one that did not.
2. *variables*: the variables of the running functions, their module globals and what these hold, a few levels deep.
   Milliseconds. It also names tensors that no module owns.
3. *scan*: every object that the garbage collector tracks, 60 to 300 ms, within a share of the time since the start.

Modules are read through their own dictionaries: no property, no overridden method and no lazy proxy of the program is
run, and nothing here keeps a module, a tensor or a frame alive.
"""

from __future__ import annotations

from gradctl._names._book import NameBook
from gradctl._names._search import Naming

__all__ = ["NameBook", "Naming"]
