"""Stage prepare: anyone's images to a few large shards and a manifest; what cannot be used is listed, never replaced.

Read: the folders, archives, lists or torchvision sets that section `prepare` of params.yaml names.
Write: data/prepare/:
  images/         manifest.arrow (id, label, split, size and source of each image), classes.json
  images/known/   images-NNNNN.tar: the images with a label, as they were encoded, or encoded anew where the settings
                  say so; and the same two files of them alone
  images/pool/    images-NNNNN.tar: the others
  refused.csv     every file left out, and why
  summary.json    counts
The same images give the same bytes, whatever the order of the files. Where the stage stops because of what it refused,
the list is in .scratch/prepare/refused.csv. What an earlier run has found good, to its end or not, is read again but
not decoded again; what an unfinished run has encoded anew is not encoded again.
Run: python -m pipeline.prepare [--params FILE]
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core import atomic, resume, stage
from pipeline.core.data import dataset
from pipeline.core.data.image_files import Unreadable
from pipeline.core.intake import choose, image_shards, journal
from pipeline.core.intake.choose import Found, Parts, Pictures, Stored
from pipeline.core.intake.examined import Examined
from pipeline.core.intake.image_shards import Sample
from pipeline.core.intake.inputs import Inputs
from pipeline.core.intake.reading import add_pictures, read_all
from pipeline.core.intake.reencoding import ENCODED, Reencoded
from pipeline.core.intake.refusals import FURTHER_FRAMES, Refusal, as_csv, check_share, in_words, reasons
from pipeline.core.intake.sources import Source, class_names, names
from pipeline.core.progress import Progress
from pipeline.core.sections import LEAST_TO_LEARN, Params, Prepare

OUT = Path("data/prepare")


def run(params: Params) -> None:
    """Prepare what the settings name. Raises ValueError where the images cannot be used as they are."""
    settings = params.prepare
    warnings.filterwarnings("ignore", module="PIL")  # damaged metadata says nothing about the pixels
    with resume.only_writer("prepare") as scratch, listed_on_error(scratch / "refused.csv") as refusals:
        inputs = Inputs.of(settings)
        inputs.warn_of_links()
        with atomic.replacing_folder(OUT) as folder:
            summary = prepare(inputs.sources, folder, scratch, settings, params.seed, refusals)
            inputs.check_unchanged()
        journal.remove(scratch, ENCODED)  # it is in place now
    tell(summary, params.mine.rank_by)


@contextmanager
def listed_on_error(file: Path) -> Iterator[list[Refusal]]:
    """Give a list to add refusals to; where the block ends in a ValueError, write it, and name its file in the error.

    Args:
        file: where to write the list; that of an earlier run is removed.
    """
    refusals: list[Refusal] = []
    file.unlink(missing_ok=True)
    try:
        yield refusals
    except ValueError as error:
        if not refusals:
            raise
        atomic.write_text(file, as_csv(refusals))
        raise ValueError(f"{error}; {file} names every file refused and why") from None


def tell(summary: dict[str, Any], rank_by: str) -> None:
    """Print what was prepared, and warn of what later stages will lack; `rank_by` is that of section `mine`."""
    counts = ", ".join(f"{split['images']:,} {name}" for name, split in summary["splits"].items())
    refused = ", ".join(f"{count:,} {reason}" for reason, count in summary["refused"].items())
    print(f"prepare: {summary['images']:,} images of {summary['classes']:,} classes: {counts}; refused: {refused or 0}")
    for split, missing in without(summary).items():
        print(f"prepare: warning: no {split} image of class {names(missing)}: nothing will be known of it there")
    pool, val = (summary["splits"][split]["images"] for split in ("unlabelled", "val"))
    if rank_by == "likeness" and pool > 0 and min(pool, val) < LEAST_TO_LEARN:
        print(
            f"prepare: warning: there are {pool:,} pool and {val:,} validation images, and mine.rank_by: likeness "
            f"takes {LEAST_TO_LEARN} of each to learn what belongs: mine will stop at that; set it to probability"
        )


def without(summary: dict[str, Any]) -> dict[str, list[str]]:
    """Name the classes of which the validation or the test split has no image, by split; where it has all, nothing."""
    has = {split: set(of_split["classes"]) for split, of_split in summary["splits"].items()}
    lacks = {split: sorted(has["labelled"] - has[split]) for split in ("val", "test")}
    return {split: missing for split, missing in lacks.items() if missing}


def prepare(
    sources: list[Source], folder: Path, scratch: Path, settings: Prepare, seed: int, refusals: list[Refusal]
) -> dict[str, Any]:
    """Write the data set of some sources into an empty folder; return its summary.

    Args:
        sources: train, and where there are any val, test and unlabelled.
        folder: where to write.
        scratch: where what was found stays for the next run.
        settings: section `prepare`; the sources that it names are open already.
        seed: of every choice.
        refusals: every refusal is added to it, also where this ends in an error.

    Raises:
        ValueError: too much was refused, a class has no image, or the sources' classes do not fit together.
    """
    classes = class_names(sources)
    max_bytes = 8 * settings.max_pixels + 10_000_000  # no encoding needs more a pixel (16-bit RGBA); room for metadata
    with Examined(scratch, settings.max_pixels) as examined:
        if len(examined):
            print(f"prepare: earlier runs have decoded {len(examined):,} images", file=sys.stderr, flush=True)
        labelled_later = settings.images_per_class is not None
        found, pictures, unread = read_all(sources, examined, max_bytes, labelled_later)
        refusals += unread
        parts, refused = choose.select(
            found,
            pictures,
            partial(add_pictures, pictures, examined, max_bytes),
            seed=seed,
            images_per_class=settings.images_per_class,
            labels_per_class=settings.labels_per_class,
            shares=held_out(settings),
        )
    refusals += refused
    looked_at = [each.source for each in unread] + [each.role for each in found if each.sha256 in pictures]
    files = {source.role: looked_at.count(source.role) for source in sources}
    check_share(files, refusals, settings.max_refused_share)
    check_parts(parts, classes, refusals)  # here too, as encoding takes long

    if settings.jpeg_quality is None:
        stored, contents = as_they_are(parts, pictures), partial(read_again, found)
    else:
        with Reencoded(scratch, settings.max_side, settings.jpeg_quality) as reencoded:
            stored, contents = reencoded.add(in_order(found, parts), max_bytes), reencoded.contents
        parts, refused = choose.one_of_each(parts, stored)
        refusals += refused
        check_parts(parts, classes, refusals)
    refusals += further_frames(parts, pictures)
    samples = to_samples(parts, stored, classes)
    (folder / "images").mkdir()
    digests = image_shards.write(folder / "images", samples, classes, settings.shard_mb * 1_000_000, contents)
    atomic.write_text(folder / "refused.csv", as_csv(refusals))
    summary = summarise(samples, classes, files, refusals, digests)
    atomic.write_json(folder / "summary.json", summary)
    return summary


def held_out(settings: Prepare) -> dict[str, float]:
    """Give the shares of train that val and test take: 0 for one that has a source of its own."""
    return {
        "val": settings.val_share if settings.val is None else 0.0,
        "test": settings.test_share if settings.test is None else 0.0,
    }


def in_order(found: list[Found], parts: Parts) -> list[Found]:
    """Give the chosen images in the order of their sources, as archives are fastest to read."""
    chosen = {each for part in parts.values() for each in part}
    return [each for each in found if each in chosen]


def check_parts(parts: Parts, classes: list[str], refusals: list[Refusal]) -> None:
    """Make sure that there is something to learn and to test. Raises ValueError where there is not."""
    missing = set(classes) - {each.file.class_name for part in ("labelled", "withheld") for each in parts[part]}
    if missing:
        refused = in_words(reasons(refusals, "train"))
        raise ValueError(
            f"prepare.train: class {names(sorted(missing))} is left without an image "
            f"(refused in train: {refused}); add images, or take the class out"
        )
    for part in ("val", "test"):
        if not parts[part]:
            raise ValueError(
                f"prepare.{part}: no image is left for it; name a source with images in prepare.{part}, or with null "
                f"give prepare.{part}_share something to take: a class of fewer than 3 images gives none"
            )


def further_frames(parts: Parts, pictures: Pictures) -> list[Refusal]:
    """List the images of which only the first frame is used."""
    return [
        choose.refuse(each, FURTHER_FRAMES, f"the first of {pictures[each.sha256].frames} is used")
        for part in parts.values()
        for each in part
        if pictures[each.sha256].frames > 1
    ]


def as_they_are(parts: Parts, pictures: Pictures) -> dict[str, Stored]:
    """Say what is stored of images that are not encoded anew, by the SHA-256 of their files."""
    seen = [(each, pictures[each.sha256]) for part in parts.values() for each in part]
    return {each.sha256: Stored(each.sha256, each.length, picture.width, picture.height) for each, picture in seen}


def to_samples(parts: Parts, stored: dict[str, Stored], classes: list[str]) -> list[Sample]:
    """Give every chosen image its split and label.

    Raises:
        ValueError: two images have one id, though their bytes differ.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    samples: dict[int, Sample] = {}
    for part, of_part in parts.items():
        for each in of_part:
            content, name = stored[each.sha256], each.file.class_name
            split = "unlabelled" if part == "withheld" else part
            label = -1 if split == "unlabelled" else label_of[name]
            withheld = label_of[name] if part == "withheld" else -1
            anew = content.sha256 != each.sha256
            sample = Sample(*content, split, label, withheld, source=each.file.name, encoded_anew=anew)
            if other := samples.get(sample.id):
                raise ValueError(f"{sample.source} and {other.source} have one id, {sample.id:016x}; remove one")
            samples[sample.id] = sample
    return list(samples.values())


def read_again(found: list[Found], samples: list[Sample]) -> Iterator[tuple[Sample, bytes]]:
    """Read the chosen images once more, in the order of their sources.

    Raises:
        ValueError: a file is gone.
    """
    wanted = {sample.sha256: sample for sample in samples}
    with Progress(len(wanted), "images", "prepare: write") as progress:
        for each in found:
            if sample := wanted.pop(each.sha256, None):
                try:
                    encoded = each.file.read()
                except Unreadable:
                    raise ValueError(
                        f"{each.file.name}: the file went away while it was read; run prepare again"
                    ) from None
                yield sample, encoded
                progress.update()


def summarise(
    samples: list[Sample], classes: list[str], files: dict[str, int], refusals: list[Refusal], digests: tuple[str, str]
) -> dict[str, Any]:
    """Count the images of each split and class, and the refusals by reason; `digests` as `image_shards.write` gives."""
    splits: dict[str, Any] = {}
    for split in dataset.SPLITS:
        labels = Counter(max(s.label, s.withheld) for s in samples if s.split == split)
        splits[split] = {
            "images": labels.total(),
            "without_label": labels.pop(-1, 0),  # neither known to the student nor withheld
            "classes": {name: labels[label] for label, name in enumerate(classes) if labels[label]},
        }
    return {
        "images": len(samples),
        "bytes": sum(sample.length for sample in samples),
        "classes": len(classes),
        "digest": digests[0],
        "known_digest": digests[1],  # of the images with a label
        "splits": splits,
        "files": {
            role: {"looked_at": count, "refused": reasons(refusals, role).total()} for role, count in files.items()
        },
        "refused": dict(sorted(Counter(each.reason for each in refusals).items())),
    }


if __name__ == "__main__":
    stage.main(run, __doc__, resumes="alone")
