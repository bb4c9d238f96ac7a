"""`python -m bench index`: what the index of two levels finds of what ranking every block finds, on a model's own text.

One dense forward per text is captured; then both ways choose step by step, each with its own heat: groups by the
reference op `open_groups`, blocks by the reference `select`, mean keys scored by softmax over what is ranked. The
forward is dense, so the queries are those of exact attention.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from bench.locality import policy_of
from bench.locality_suite import capture_text
from bench.record_suite import token_ids
from bench.schema import Row
from bench.texts import TEXTS
from csrc_free_kernels.reference.open_groups import open_groups
from csrc_free_kernels.reference.select import select
from rheo_offload.calibration.capture import Sample
from rheo_offload.calibration.score import WARM_QUERIES
from rheo_offload.config import SelectionConfig
from rheo_offload.model.loader import PACKAGED_MODEL, load
from rheo_offload.selection.index import Groups, Index, groups_to_open
from rheo_offload.types import Policy

__all__ = ["Found", "add_parser", "replay", "run_index"]

DEFAULT_TEXTS = ("prose-reference", "code-modules", "json-log")
QUICK = {
    "prompt_tokens": 1024,
    "steps": 8,
    "texts": ["prose-reference"],
    "token_budgets": [256],
    "groups": [4],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Means over steps and KV heads of what the index chose, beside the ranking of all blocks."""

    best: float
    """Of the blocks that the query would choose among all, the share in open groups."""
    same: float
    """Of all that would be selected, the share that is."""
    mass_flat: float
    """Attention mass inside what would be selected ..."""
    mass: float
    """... and inside what is."""
    opened: float
    """Share of the blocks that are ranked."""


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    common: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Sequence[str]], int],
    list_of: Callable[[Callable[[str], object]], Callable[[str], list[object]]],
) -> None:
    """Add the `index` suite."""
    parser = subparsers.add_parser(
        "index", parents=[common], help="what the index of two levels finds of the flat ranking"
    )
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--texts", type=list_of(str), default=list(DEFAULT_TEXTS), metavar="NAME,...")
    parser.add_argument("--prompt-tokens", type=int, default=24576)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--token-budgets", type=list_of(int), default=[1024, 2048], metavar="N,...")
    parser.add_argument("--groups", type=list_of(int), default=[16, 32, 64], metavar="BLOCKS,...")
    parser.add_argument(
        "--keep", type=list_of(float), default=[0.0625, 0.09, 0.125, 0.25], metavar="SHARE,..."
    )
    parser.set_defaults(run=run)


def replay(sample: Sample, policy: Policy, groups: Groups) -> Found:
    """Choose for every query of a layer but the first, which only warm the heat.

    Args:
        sample: of one layer; T consecutive queries, N blocks.
        policy: of the budget.
        groups: how many are opened.
    """
    rows, found = _Rows(sample, policy, groups), []
    for t in range(len(sample.positions)):
        flat, two = rows.step(t)
        if t >= WARM_QUERIES:
            mass = sample.mass[t]  # [Hkv, N]
            shares = [
                (rows.best(t) & two.ranked).sum(-1) / policy.query_blocks,
                (flat.chosen & two.chosen).sum(-1) / policy.block_budget,
                (mass * flat.chosen).sum(-1),
                (mass * two.chosen).sum(-1),
                two.ranked.sum(-1) / flat.ranked.sum(-1),
            ]
            found.append(torch.stack([share.float().mean() for share in shares]))
    return Found(**dict(zip(Found.__slots__, torch.stack(found).mean(0).tolist(), strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """Of one step: which blocks were ranked, and which were chosen, bool [Hkv, N]."""

    ranked: Tensor
    chosen: Tensor


class _Rows:
    """A layer's two rows of heat, and a step of each: all blocks ranked, and those of open groups."""

    def __init__(self, sample: Sample, policy: Policy, groups: Groups) -> None:
        self.sample, self.policy, self.groups = sample, policy, groups
        heads, _, _, dim = sample.q.shape
        blocks, size = len(sample.mean_keys), groups.group_blocks
        self.logits = torch.einsum("hgtd,nhd->thgn", sample.q, sample.mean_keys) * sample.softmax_scale
        self.heat = torch.zeros(2, heads, blocks)
        self.blocks = torch.arange(blocks)
        whole = (
            sample.mean_keys[: blocks // size * size].unflatten(0, (-1, size)).transpose(0, 2)
        )  # [H, R, M, D]
        self.bounds = torch.full((1, heads, -(-blocks // size), 2, dim), torch.nan)
        self.bounds[0, :, : blocks // size] = torch.stack((whole.amax(1), whole.amin(1)), 2)

    def step(self, t: int) -> tuple[_Choice, _Choice]:
        """Return what is chosen for query t among all blocks, and among those of open groups."""
        lens = self.sample.positions[t : t + 1].int() + 1
        exists = (self.blocks < -(-int(lens) // self.sample.block_size)).expand_as(self.heat[0])
        return self._choose(t, 0, lens, exists), self._choose(t, 1, lens, exists & self._opened(t, lens))

    def best(self, t: int) -> Tensor:
        """Return the blocks that query t scores highest beside the forced ones, as many as it may choose: [Hkv, N]."""
        policy, closed = self.policy, self.sample.closed()[t]
        last = int(self.sample.positions[t]) // self.sample.block_size + 1 - policy.recent_blocks
        free = closed & (self.blocks >= policy.sink_blocks) & (self.blocks < last)
        scores = self._scores(t, closed.expand_as(self.heat[0])).masked_fill(~free, -torch.inf)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(
            1, scores.topk(policy.query_blocks).indices, True
        )

    def _opened(self, t: int, lens: Tensor) -> Tensor:
        groups, summary = self.groups, self.sample.mean_keys[:, :, None]
        heads, listed = len(self.heat[0]), groups.listed
        lists, count = (
            torch.zeros(1, heads, listed, dtype=torch.int32),
            torch.zeros(1, heads, dtype=torch.int32),
        )
        # every home writes the bounds of a group that a token completes: here they are all there, so on a copy
        q, table = self.sample.q[:, :, t].flatten(0, 1)[None], self.blocks[None].int()
        open_groups(
            q, self.bounds.clone(), summary, self.heat[1:], table, lens, None,
            torch.zeros(1, heads, 2, self.bounds.shape[2]), lists, count, block_size=self.sample.block_size,
            **asdict(groups),
        )  # fmt: skip
        is_open = torch.zeros(heads, self.bounds.shape[2] + 1, dtype=torch.bool)
        is_open.scatter_(1, lists[0].long() % is_open.shape[1], True)  # -1 marks the spare place
        return is_open[:, self.blocks // groups.group_blocks]

    def _choose(self, t: int, which: int, lens: Tensor, ranked: Tensor) -> _Choice:
        policy, heat = self.policy, self.heat[which]
        closed = ranked & self.sample.closed()[t]
        scores = self._scores(t, closed)
        chosen = torch.zeros(1, len(heat), policy.block_budget, dtype=torch.int32)
        select(
            scores[None], heat.masked_fill(~ranked, -torch.inf)[None], lens, chosen, torch.zeros_like(chosen[..., 0]),
            block_size=self.sample.block_size, sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks,
            query_blocks=policy.query_blocks, agnostic_blocks=policy.agnostic_blocks,
            heat_decay=policy.heat_decay, normalise="none",
        )  # fmt: skip
        new = heat * policy.heat_decay + torch.where(closed, scores, 0.0)  # mean-key scores add up to one
        self.heat[which] = torch.where(ranked, new, heat)
        marked = torch.zeros_like(ranked).scatter_(1, chosen[0].long().clamp(min=0), True)
        return _Choice(ranked=ranked, chosen=marked)

    def _scores(self, t: int, closed: Tensor) -> Tensor:
        """Return the mean-key scores [Hkv, N] over the closed blocks given, -inf elsewhere."""
        weights = self.logits[t].masked_fill(~closed[:, None], -torch.inf).softmax(-1).mean(1)
        return torch.where(closed, weights, -torch.inf)


def run_index(args: argparse.Namespace, device: torch.device, add: Callable[[Row], None]) -> None:
    """Replay every setting on every text, handing a row to `add` as soon as there is one."""
    if args.quick:
        vars(args).update(QUICK)
    model, tokenizer = load(args.model, device=str(device), dtype="float32")
    for text in args.texts:
        ids = token_ids(tokenizer, TEXTS[text](), args.prompt_tokens + args.steps)[0]
        samples = list(
            capture_text(model, ids, prompt_tokens=args.prompt_tokens, block_size=args.block_size).values()
        )
        for row in _rows(samples, args, text):
            add(row)


def _rows(samples: Sequence[Sample], args: argparse.Namespace, text: str) -> Iterator[Row]:
    for budget in args.token_budgets:
        policy = _policy(budget // args.block_size)
        settings = ((size, keep) for size in args.groups for keep in args.keep)
        for size, keep in settings:
            index = Index(group_blocks=size, keep=keep)
            groups = groups_to_open(policy, len(samples[0].mean_keys), index)
            found = [replay(sample, policy, groups) for sample in samples]
            mean = {name: sum(getattr(f, name) for f in found) / len(found) for name in Found.__slots__}
            yield Row(
                suite="index",
                case_id=f"{text}-n{policy.block_budget}-r{size}-keep{keep:g}",
                metric="mass_kept",
                unit="fraction",
                p50=mean["mass"] / mean["mass_flat"],
                model=args.model,
                batch=1,
                context_len_tokens=args.prompt_tokens,
                block_size=args.block_size,
                token_budget=budget,
                method="mean_key",
                fill=text,
                captured_mass=mean["mass"],
                note=" ".join(f"{name}={value:.3f}" for name, value in mean.items()),
            )


def _policy(blocks: int) -> Policy:
    """Return the default shares of a budget."""
    default = SelectionConfig()
    return replace(policy_of(blocks, default.query_agnostic_share), heat_decay=default.heat_decay)
