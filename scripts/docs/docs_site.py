"""A hook of mkdocs: files of the repository outside docs/ that a page links to become part of the site.

Pages keep links that also work in the repository, like `../configs/haproxy/haproxy.cfg`. A link to a file that does not
exist stays as it is, and `mkdocs build --strict` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

COPIES = "repository"
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_page_markdown(markdown: str, /, *, page: Any, config: Any, files: Files) -> str:
    """Replaces links that leave docs/ by links to copies, and adds the copies to the site."""
    root = Path(config.config_file_path).parent
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def replaced(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        if "://" in link[2] or path.startswith("docs/") or not (root / path).is_file():
            return link[0]
        copy = posixpath.join(COPIES, path)
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(root / path)))
        return link[1] + posixpath.relpath(copy, posixpath.dirname(page.file.src_uri) or ".") + link[3]

    return _LINK.sub(replaced, markdown)
