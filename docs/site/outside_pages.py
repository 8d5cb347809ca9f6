"""A hook of mkdocs: README.md and CONTRIBUTING.md, which lie outside docs/, become pages of the site.

Links are written for the repository. On the site a link to one of those two leads to its page, a link to a folder leads
to the folder's README.md, and a link to code keeps its text alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
OUTSIDE = {"overview.md": ROOT / "README.md", "contributing.md": ROOT / "CONTRIBUTING.md"}
STYLE = ".md-typeset td code { white-space: nowrap } .md-grid { max-width: 74rem }\n"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs with all files of the site: adds the two pages and the style sheet."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=source.read_text(encoding="utf-8")))
    files.append(File.generated(config, "site.css", content=STYLE))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page's text: its links as they are on the site."""
    here = page.file.src_uri
    source = OUTSIDE.get(here, DOCS / here)
    pages = {path: DOCS / name for name, path in OUTSIDE.items()}

    def site_path(path: str) -> str | None:
        """Where a path of the repository is on the site; None for what is not there."""
        target = Path(os.path.normpath(source.parent / path))
        target = pages.get(target, target / "README.md" if target.is_dir() else target)
        return os.path.relpath(target, (DOCS / here).parent) if target.is_relative_to(DOCS) else None

    def for_site(link: re.Match[str]) -> str:
        path = site_path(link["path"])
        return link["text"] if path is None else f"[{link['text']}]({path}{link['anchor'] or ''})"

    if here == "overview.md":
        markdown = markdown.replace("](docs/images/", "](images/")
    return LINK.sub(for_site, markdown)
