"""All sources that prepare's settings name: opened, and looked at again when all has been read."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline.core.intake import archives
from pipeline.core.intake.archives import Tree
from pipeline.core.intake.sources import TORCHVISION, Source, SourceFile, check_apart, names, open_source
from pipeline.core.sections import Prepare

ROLES = ("train", "val", "test", "unlabelled")
CHANGED = (  # as while files are still being copied there
    "came, went or changed while prepare read, so that DVC would record it unread; when nothing is written there any "
    "more, run this again"
)


@dataclass(frozen=True)
class Inputs:
    """The sources of one run.

    Attributes:
        settings: section `prepare`.
        sources: one of each role that the settings give a place.
        opened: the archives among their places, of which several sources may lie in one.
    """

    settings: Prepare
    sources: list[Source]
    opened: dict[Path, Tree]

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
        return cls(settings, found, opened)

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
        for path, tree in self.opened.items():
            if archives.state_of(path) != tree.state:
                raise ValueError(f"{path}: {CHANGED}")
        for source in self.sources:
            root, inner = _place(self.settings, source.role)
            if inner is None or inner.startswith(TORCHVISION) or source.archive:
                continue  # torchvision has compared its files with checksums, and archives are compared above
            now = open_source(source.role, root, inner, self.opened)
            if others := {*map(_hash, source.files)} ^ {*map(_hash, now.files)}:
                name = min(file.name for file in (*source.files, *now.files) if _hash(file) in others)
                raise ValueError(f"prepare.{source.role}: {source.place}: {name}: {CHANGED}")


def _place(settings: Prepare, role: str) -> tuple[str, str | None]:
    """Give a source's root, and its place in it: see `sources.open_source`."""
    root = settings.unlabelled_root if role == "unlabelled" else settings.labelled_root
    return root, getattr(settings, role)


def _hash(file: SourceFile) -> int:
    """Stand for what is known of a file unread: there may be millions, of which a number each takes less memory."""
    return hash((file.name, file.class_name, file.size))


def _say(words: str) -> None:
    print(f"prepare: {words}", file=sys.stderr, flush=True)
