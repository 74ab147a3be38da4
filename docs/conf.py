"""How Sphinx makes the site (`make docs`) and the manual pages (`make man`) of the Markdown in this folder. Rule:
nothing is said here that a reader of the Markdown alone would miss.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

project = "cachefs"
author = "the cachefs developers"
copyright = author
version = release = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"][
    "version"
]

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
smartquotes = False  # They would make a dash of --json.

html_theme = "furo"
html_title = f"cachefs {version}"
html_static_path = ["site"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options: dict[str, list[str]] = {"footer_icons": []}  # None of a forge: the sources are beside it.
highlight_language = "none"
pygments_style = "friendly"
pygments_dark_style = "github-dark"

man_pages = [
    ("man/cachefs.8", "cachefs", "every Glance image on this node, already there", author, "8"),
    ("man/cachefs.conf.5", "cachefs.conf", "configuration of cachefs", author, "5"),
    ("man/mount.cachefs.8", "mount.cachefs", "mount cachefs by mount(8) and fstab(5)", author, "8"),
]
