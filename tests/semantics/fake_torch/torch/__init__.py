"""Stands for torch where a test is about how a script is started: gradctl waits for the name only."""

__version__ = "0.0"
