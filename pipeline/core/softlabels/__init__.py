"""The soft-label cache: a teacher's answers for (sample, replica), stored once, found by content.

`FORMAT.md` names every byte. `store` opens, asks and extends a cache; `shards` writes and reads one file of it;
`records` packs distributions into bytes and back.
"""

from pipeline.core.softlabels.records import SparseLabels, dense
from pipeline.core.softlabels.store import Description, SoftLabels, describe, make_keys, read_description

__all__ = ["Description", "SoftLabels", "SparseLabels", "dense", "describe", "make_keys", "read_description"]
