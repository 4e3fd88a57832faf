"""Token sorting, gathering and merging: the three operations of a layer stack that runs on part of its tokens.

`select` chooses K of S positions per row, `gather` takes their states out, `merge` puts them back. Each is one
function with a reference in plain torch; nothing here knows of BERT.
"""

from sctd_kernels.dispatch import backend
from sctd_kernels.gather_merge import gather, gather_rows, merge
from sctd_kernels.hashing import mix_rows
from sctd_kernels.select import Selection, select

__all__ = ["Selection", "backend", "gather", "gather_rows", "merge", "mix_rows", "select"]
