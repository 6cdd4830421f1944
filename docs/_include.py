"""What the pages take from outside of docs/, so that each text and figure stands in one place.

A line of a page that is only a link to `../FILE.md#section`, or to a whole `../FILE.md`, is a link on GitHub,
and that text in the built documentation. Other links out of docs/ lead to the repository, but figures are
copied into the site. README.md is shown by PyPI too and has whole addresses; those of our pages stay here.
mkdocs calls the two functions that begin with `on_`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
BLOB = "https://github.com/schedulefree-twin/schedulefree-twin/blob/main/"
RAW = "https://raw.githubusercontent.com/schedulefree-twin/schedulefree-twin/main/"
PART = re.compile(r"^\[[^\]]*\]\(\.\./([\w/]+\.md)(?:#([\w-]+))?\)$", re.MULTILINE)
FIGURES = "benchmarks/results/"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the figures."""
    for figure in sorted((ROOT / FIGURES).glob("*.png")):
        files.append(File.generated(config, FIGURES + figure.name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the text in place of each link to it, and leads other links out of docs/ to where they are."""
    text = PART.sub(lambda found: part(found[1], found[2]), markdown)
    text = text.replace(f"]({RAW}{FIGURES}", f"]({FIGURES}").replace(f"]({BLOB}docs/", "](")
    if "/" in page.file.src_uri:  # `../` leads to docs/, and not out of it
        return text
    return text.replace(f"](../{FIGURES}", f"]({FIGURES}").replace("](../", f"]({BLOB}")


def part(file: str, anchor: str | None) -> str:
    """Returns a section without its heading, or a file without its title."""
    text = (ROOT / file).read_text()
    if anchor is None:
        return text.partition("\n")[2].strip()
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", text, re.MULTILINE))
    by_anchor = {slugify(title, "-"): body for title, body in sections.items()}
    if anchor not in by_anchor:
        raise PluginError(
            f"{file} must have the section #{anchor}, got {sorted(by_anchor)}: correct the link"
        )
    return by_anchor[anchor].strip()
