"""LServe's hierarchical pages: Quest's bound for logical pages of 16 tokens, a physical block counts as its best page.

arXiv:2502.14866, mit-han-lab/omniserve. Big blocks for the link and small pages for the bound, which loosens quickly
with size. Scored per query head there; here the maximum over the group, as for Quest. Its reuse of a
selection for 4 steps is `selection.reuse_steps`, its streaming heads are method `duo` with this scorer. Not here: its
4-bit cache.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from rheo_offload.selection.quest import Quest


@dataclass(frozen=True, slots=True, kw_only=True)
class LServe(Quest):
    """See the module."""

    name: ClassVar[str] = "lserve"

    page_size: int | Literal["block"] = 16
    """Tokens of a logical page, a power of two, 4 to the block size; `block`: as Quest."""
