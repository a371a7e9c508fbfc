"""`python -m gradctl` is the command `gradctl`."""

from __future__ import annotations

from gradctl._cli import main

if __name__ == "__main__":
    main()
