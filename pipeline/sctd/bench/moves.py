"""Selecting, splitting and merging: ours, torch's and DeepSpeed's.

Legend: B rows, S positions a row, K kept positions a row, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from sctd.bench.candidates import Call, Group, forward, ours, with_backward
from sctd.bench.paths import DTYPES, SPECIAL, make_batch, make_shape
from sctd.bench.timing import DEVICE
from sctd.config import Config
from sctd.model.token_dropping import kept_tokens
from sctd_kernels import Selection, merge, select, split

TOGETHER = "select + split + merge"
_LTD = "DeepSpeed random-LTD"


def moves(config: Config, rows: int, length: int, backends: list[str], has_ltd: bool) -> dict[str, Group]:
    """Each alone and all together, forward and with the backward behind it."""
    work = _Work(config, rows, length)
    calls = {
        "select": ours(backends, work.select) | {"topk + sort": work.topk},
        "split": ours(backends, work.split) | {"gather": work.gather},
        "merge": ours(backends, work.merge) | {"scatter": work.scatter},
        TOGETHER: ours(backends, work.together)
        | {"topk + gather + scatter": work.plain, "the same, compiled": torch.compile(work.plain)},
    }
    if has_ltd:
        for title, call in work.deepspeed().items():
            calls[title][_LTD] = call
    hidden_BSD, kept_BKD = work.hidden_BSD, work.kept_BKD
    of = {"split": [hidden_BSD], "merge": [hidden_BSD, kept_BKD], TOGETHER: [hidden_BSD]}
    groups = {}
    for title, (bytes_forward, bytes_both) in work.moved().items():
        groups[title] = Group(forward(calls[title]), bytes_forward)
        if title in of:
            groups[f"{title}, with backward"] = Group(with_backward(calls[title], of[title]), bytes_both)
    return groups


class _Work:
    """The tensors of one size, and the calls that all work on them."""

    def __init__(self, config: Config, rows: int, length: int) -> None:
        shape, dtype = make_shape(config, length), DTYPES[config.train.precision]
        batch = make_batch(config, shape.vocab_size, rows, length)
        self.ids_BS, self.seed_B = batch["input_ids"], batch["row_seed"]
        self.keep = kept_tokens(config.model.keep_ratio, length)
        self.table_V = torch.rand(shape.vocab_size, device=DEVICE)
        self.table_V[[SPECIAL.cls, SPECIAL.sep, SPECIAL.mask]] = float("inf")
        self.hidden_BSD = torch.randn(rows, length, shape.hidden_size, device=DEVICE, dtype=dtype).requires_grad_()
        self.kept_BKD = self.hidden_BSD.detach()[:, : self.keep].clone().requires_grad_()
        self.selection = self.select()
        self.index_BKD = self._wide(self.selection.kept_BK)

    def moved(self) -> dict[str, tuple[int, int]]:
        """Bytes that are read and written, in a forward and with its backward, by one pass for each of them."""
        rows, length, width = self.hidden_BSD.shape
        keep, state = self.keep, rows * width * self.hidden_BSD.element_size()
        maps = 3 * self.ids_BS.nbytes  # ids in, both lists of positions and the inverse out
        split_forward, split_both = 2 * keep * state, (3 * keep + 2 * length) * state
        merge_forward, merge_both = 2 * length * state, (keep + 4 * length) * state
        return {
            "select": (maps, maps),
            "split": (split_forward, split_both),
            "merge": (merge_forward, merge_both),
            TOGETHER: (maps + split_forward + merge_forward, maps + split_both + merge_both),
        }

    def select(self) -> Selection:
        return select(self.ids_BS, self.keep, self.seed_B, table_V=self.table_V)

    def split(self) -> tuple[Tensor, Tensor]:
        return split(self.hidden_BSD, self.selection)

    def merge(self) -> Tensor:
        return merge(self.hidden_BSD, self.kept_BKD, self.selection)

    def together(self) -> Tensor:
        selection = self.select()
        kept_BKD, rest_BSD = split(self.hidden_BSD, selection)
        return merge(rest_BSD, kept_BKD, selection)

    def topk(self) -> Tensor:
        return self.table_V[self.ids_BS].topk(self.keep, dim=1).indices.sort(dim=1).values

    def gather(self) -> tuple[Tensor, Tensor]:
        return self.hidden_BSD.gather(1, self.index_BKD), self.hidden_BSD

    def scatter(self) -> Tensor:
        return self.hidden_BSD.scatter(1, self.index_BKD, self.kept_BKD)

    def plain(self) -> Tensor:
        index_BKD = self._wide(self.topk())
        return self.hidden_BSD.scatter(1, index_BKD, self.hidden_BSD.gather(1, index_BKD))

    def deepspeed(self) -> dict[str, Call]:
        """DeepSpeed's operations; its choice is at random."""
        from deepspeed.ops.random_ltd.dropping_utils import GatherTokens, ScatterTokens, gpt_sample_tokens

        rows, length, _ = self.hidden_BSD.shape

        def sample() -> Tensor:
            index_1BK, _ = gpt_sample_tokens(self.keep, length, rows, 1, device=str(DEVICE))
            return index_1BK[0]

        def together() -> Tensor:
            index_BK = sample()
            rest_BSD, kept_BKD = GatherTokens.apply(self.hidden_BSD, index_BK, True)
            return ScatterTokens.apply(rest_BSD, kept_BKD, index_BK, True)

        index_BK = sample()
        return {
            "select": sample,
            "split": lambda: GatherTokens.apply(self.hidden_BSD, index_BK, True),
            "merge": lambda: ScatterTokens.apply(self.hidden_BSD, self.kept_BKD, index_BK, True),
            TOGETHER: together,
        }

    def _wide(self, index_BK: Tensor) -> Tensor:
        return index_BK[..., None].expand(-1, -1, self.hidden_BSD.shape[-1])
