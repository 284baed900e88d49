# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What the documentation site takes from outside `docs/`: the command line's help, and the files that pages link to."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import clmae.cli
from clmae.cli.evaluate import NAMES

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#:\s]+)")


def help_of(*arguments: str) -> str:
    """What `clmae ARGUMENTS` prints, which asks for a help."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        clmae.cli.main(arguments)
    return output.getvalue().strip()


def commands() -> list[str]:
    """All commands; `evaluate` once for each of its protocols."""
    return [
        f"{command} {protocol}".strip()
        for command in clmae.cli.COMMANDS
        for protocol in (NAMES if command == "evaluate" else ("",))
    ]


def linked_files() -> set[Path]:
    """The files outside `docs/` that its pages link to, and those that these link to, relative to the repository."""
    pages, linked = list((ROOT / "docs").glob("*.md")), set()
    while pages:
        page = pages.pop()
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            outside = path.is_file() and not path.is_relative_to(ROOT / "docs")
            if outside and path.relative_to(ROOT) not in linked:
                linked.add(path.relative_to(ROOT))
                pages += [path] * (path.suffix == ".md")
    return linked


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Adds the linked files and the reference of the command line."""
    for path in linked_files():
        files.append(File.generated(config, path.as_posix(), abs_src_path=str(ROOT / path)))
    lines = ["# Command line", "", "```text", help_of("--help"), "```"]
    for command in commands():
        lines += ["", f"## clmae {command}", "", "```text", help_of(*command.split(), "--help-all"), "```"]
    files.append(File.generated(config, "cli.md", content="\n".join(lines) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links out of `docs/` lead to the copies of those files within the site."""
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown
