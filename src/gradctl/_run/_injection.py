"""What `gradctl run` puts into the environment of a script, and how it is taken out again.

One folder on PYTHONPATH, which holds our `sitecustomize`, and one variable, which tells it and its children what to do.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from gradctl import __version__

SITE = str(Path(__file__).parent / "_site")
VARIABLE = "GRADCTL_RUN"


def inject(environment: MutableMapping[str, str], settings: Mapping[str, Any]) -> None:
    """Have every Python that is started with this environment, and its children, listen as `settings` say.

    `site`, `main_pid` and `python` are found in the variable by `_site/sitecustomize.py` without a parser: nothing is
    escaped beyond what JSON needs, and each of these keys is followed by another.
    """
    head = {
        "version": __version__,
        "site": SITE,
        "main_pid": os.getpid(),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }
    environment[VARIABLE] = json.dumps(head | dict(settings), ensure_ascii=False)
    environment["PYTHONPATH"] = os.pathsep.join([SITE, *_other_paths(environment)])


def withdraw(environment: MutableMapping[str, str]) -> None:
    """Take gradctl out of an environment, so that a Python started with it is not recorded."""
    environment.pop(VARIABLE, None)
    paths = _other_paths(environment)
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    else:
        environment.pop("PYTHONPATH", None)


def _other_paths(environment: Mapping[str, str]) -> list[str]:
    found = environment.get("PYTHONPATH")
    return [path for path in found.split(os.pathsep) if path != SITE] if found else []
