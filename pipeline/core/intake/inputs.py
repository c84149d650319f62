"""All sources that prepare's settings name: opened, and looked at again when all has been read."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline.core.intake import archives
from pipeline.core.intake.archives import Tree
from pipeline.core.intake.sources import TORCHVISION, Source, check_apart, names, open_source
from pipeline.core.sections import Prepare

ROLES = ("train", "val", "test", "unlabelled")
COPYING = "changed while it was read, as while files are still being copied there; once that is done, run this again"


@dataclass(frozen=True)
class Inputs:
    """The sources of one run.

    Attributes:
        settings: section `prepare`.
        sources: one of each role that the settings give a place.
        opened: the archives among their places, of which several sources may lie in one.
        held: size and time of the last change of each of these, when it was opened.
    """

    settings: Prepare
    sources: list[Source]
    opened: dict[Path, Tree]
    held: dict[Path, tuple[int, int]]

    @classmethod
    def of(cls, settings: Prepare) -> Self:
        """List the files of every source. Raises ValueError as `sources.open_source` does."""
        opened: dict[Path, Tree] = {}
        found = []
        for role in ROLES:
            root, inner = _place(settings, role)
            if inner is not None:
                check_apart(role, Path(root), inner, Path(settings.labelled_root, settings.train))
                source = open_source(role, root, inner, opened)
                _say(f"{role}: {len(source.files):,} files in {source.place}")
                found.append(source)
        for path, tree in opened.items():
            if tree.repeated:
                _say(
                    f"{path} holds {tree.repeated:,} of its files more than once, as after `tar -u`: the last of each "
                    "is used, as unpacking would"
                )
        return cls(settings, found, opened, {path: _state(path) for path in opened})

    def warn_of_links(self) -> None:
        """Say which folders of images DVC does not look into."""
        for root in sorted({self.settings.labelled_root, self.settings.unlabelled_root}):
            links = [link.relative_to(root).as_posix() for link in archives.links_out(Path(root))]
            if links := [link for link in links if not archives.hidden(link)]:
                _say(
                    f"warning: DVC does not look into linked folders outside of {root}: {names(links)}; when images "
                    "change there, run `dvc repro --force --single-item prepare`, or copy the folders"
                )

    def check_unchanged(self) -> None:
        """Make sure that folders and archives are as they were when they were opened: DVC records them as they are now.

        Raises:
            ValueError: files came, went or changed; one is named.
        """
        for path, held in self.held.items():
            if _state(path) != held:
                raise ValueError(f"{path}: {COPYING}")
        for source in self.sources:
            root, inner = _place(self.settings, source.role)
            if inner is None or inner.startswith(TORCHVISION):
                continue
            files = {(file.name, file.size) for file in source.files}
            if others := files ^ {(f.name, f.size) for f in open_source(source.role, root, inner, self.opened).files}:
                raise ValueError(f"prepare.{source.role}: {source.place}: {min(others)[0]}: {COPYING}")


def _place(settings: Prepare, role: str) -> tuple[str, str | None]:
    """Give a source's root, and its place in it: see `sources.open_source`."""
    root = settings.unlabelled_root if role == "unlabelled" else settings.labelled_root
    return root, getattr(settings, role)


def _state(path: Path) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def _say(words: str) -> None:
    print(f"prepare: {words}", file=sys.stderr, flush=True)
