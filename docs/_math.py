r"""Mathematics of the pages: $`x`$ in a line, a fence of the kind math on its own, both as GitHub shows them.

It becomes MathML while the site is built, by latex2mathml: every browser knows it, nothing is fetched, and no
script runs. mkdocs calls `on_config`.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from mkdocs.config.defaults import MkDocsConfig


class Inline(InlineProcessor):
    """Turns one formula in a line into MathML."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:
        """Is called by Markdown for each match."""
        return self.md.htmlStash.store(convert(m[1])), m.start(), m.end()


class Mathematics(Extension):
    """Adds `Inline`, before what takes backquotes for code."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Is called by Markdown once."""
        md.inlinePatterns.register(Inline(r"\$`([^`]+)`\$", md), "mathematics", 195)


def block(source: str, *_: Any, **__: Any) -> str:
    """Returns one formula on a line of its own, which scrolls where it is too wide."""
    return f'<div class="mathematics">{convert(source, display="block")}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds both to the extensions of Markdown."""
    config.markdown_extensions.append(Mathematics())  # type: ignore[arg-type]
    fence = {"name": "math", "class": "mathematics", "format": block}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config
