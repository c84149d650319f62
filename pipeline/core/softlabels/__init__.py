"""The soft-label cache: a teacher's answers for (sample, replica), stored once, found by content.

`FORMAT.md` names every byte. `store` opens and asks a cache, `writing` finishes one; `shards` writes and reads one file
of it, `index` says in which a key is found; `keys` names views; `records` turns distributions into bits and back;
`sealed` is what all files have in common.
"""

from pipeline.core.softlabels.keys import make_keys
from pipeline.core.softlabels.records import SparseLabels, dense
from pipeline.core.softlabels.store import Description, SoftLabels, read_description, read_summary

__all__ = [
    "Description",
    "SoftLabels",
    "SparseLabels",
    "dense",
    "make_keys",
    "read_description",
    "read_summary",
]
