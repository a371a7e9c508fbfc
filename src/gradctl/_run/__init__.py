"""`gradctl run`: become the script, listen in it once torch is there, draw the report when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Recording", "record", "start"]

if TYPE_CHECKING:
    from gradctl._run._recording import Recording, record
    from gradctl._run._start import start
else:

    def __getattr__(name):
        # Loaded when used: this package is also imported inside the scripts of others.
        import importlib

        homes = {"Recording": "_recording", "record": "_recording", "start": "_start"}
        if name not in homes:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
