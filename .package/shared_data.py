"""Puts manual pages and scripts for shell completion into the wheel, made from the parsers."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SharedData(BuildHookInterface[Any]):
    """Makes the files in a temporary folder before the wheel is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the files to those of the wheel; an editable installation gets none."""
        if version == "editable":
            return
        sys.path.insert(0, self.root)
        from qcow2bm.cli.completion import scripts
        from qcow2bm.cli.man_pages import man_pages

        self._folder = Path(tempfile.mkdtemp())
        for number, (place, text) in enumerate(
            (
                *((f"share/man/man1/{name}", text) for name, text in man_pages()),
                *scripts(),
            )
        ):
            path = self._folder / str(number)
            path.write_text(text)
            build_data["shared_data"][str(path)] = place

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the temporary folder."""
        if version != "editable":
            shutil.rmtree(self._folder)
