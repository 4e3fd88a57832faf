"""Token sorting, gathering and merging: the operations of a layer stack that runs on part of its tokens.

`select` chooses K of S positions per row, `split` (or `gather`) takes their states out, `merge` puts them back. Beside
them stands what lies between the matrix products of a layer (`rotate`, `dropout`, `dropout_add_norm`, `linear_gelu`,
`geglu`) and behind them (`token_losses`). Each is one function over several backends, of which the one in plain torch
is the reference; nothing here knows of BERT.
"""

from sctd_kernels.cross_entropy import FIXED_POINT, token_losses
from sctd_kernels.dispatch import backend
from sctd_kernels.elementwise import dropout, dropout_add_norm, geglu, linear_gelu
from sctd_kernels.gather_merge import gather, gather_rows, merge, split
from sctd_kernels.hashing import mix_rows
from sctd_kernels.rotary import rotary_table, rotate
from sctd_kernels.select import Selection, select

__all__ = [
    "FIXED_POINT", "Selection", "backend", "dropout", "dropout_add_norm", "gather", "gather_rows", "geglu",
    "linear_gelu", "merge", "mix_rows", "rotary_table", "rotate", "select", "split", "token_losses",
]  # fmt: skip
