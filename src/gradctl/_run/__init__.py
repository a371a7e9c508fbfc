"""`gradctl run`: become the script, listen in it once torch is there, draw the report when it ends.

`gradctl explain` and `gradctl fit` start scripts in the same way, and wait for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Options", "Recording", "explain", "fit", "record", "start"]

if TYPE_CHECKING:
    from gradctl._run._explaining import explain
    from gradctl._run._fitting import fit
    from gradctl._run._outcome import Options
    from gradctl._run._recording import Recording, record
    from gradctl._run._start import start
else:

    def __getattr__(name):
        # Loaded when used: this package is also imported inside the scripts of others.
        import importlib

        homes = {
            "Options": "_outcome",
            "Recording": "_recording",
            "explain": "_explaining",
            "fit": "_fitting",
            "record": "_recording",
            "start": "_start",
        }
        if name not in homes:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
