"""Sphinx configuration: Markdown pages, nothing is fetched while building."""

from __future__ import annotations

import gradctl

project = "gradctl"
author = "The gradctl authors"
copyright = f"2026, {author}"
version = release = gradctl.__version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"gradctl {release}"
exclude_patterns = ["_build"]
# The theme's own icons and styles only: a page that is opened offline asks for nothing.
html_theme_options = {"navigation_with_keys": True}
