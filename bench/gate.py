"""The correctness gate: no time is reported for a configuration whose tokens are wrong."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from bench.decoder import Decoder, Reference, Unsupported
from bench.dense import IMPLEMENTATIONS
from bench.graphed import DenseGraph
from bench.ours import Rheo
from bench.shapes import merge_weights, random_model, tiny_config
from rheo_offload.config import RheoConfig

PROMPT_BLOCKS = 5
NEW_TOKENS = 8
HOST_MEMORY = "256MiB"


def gate(hf_config: PreTrainedConfig, config: RheoConfig, device: torch.device, rows: int) -> str:
    """Compare greedy tokens with stock attention in fp32 on a tiny model of the same architecture.

    The budget covers the whole context, so selection must not matter: once with all blocks resident, once
    with all dropped before each step that may be, so that the transfer path is on trial too. On a GPU the
    steps on trial are replays, but for the first two.

    Returns:
        What differs, or the empty string.
    """
    model, ids, wanted = _truth(hf_config, config, device, rows)
    for what, before in (("all blocks resident", None), ("blocks dropped", _drop_and_poison)):
        subject = Rheo(model, _full_budget(config))
        got = _tokens(subject, ids, before)
        if problem := _difference(got, wanted):
            return f"{problem} with {what}"
        if subject.eager_because:
            return f"the step was not captured: {subject.eager_because}"
    return ""


def dense_gate(hf_config: PreTrainedConfig, config: RheoConfig, device: torch.device, rows: int) -> str:
    """Compare the captured dense peer with stock attention in the same way, whichever of its attentions runs in fp32.

    Returns:
        What differs, or the empty string; also where the peer cannot run at all.
    """
    model, ids, wanted = _truth(hf_config, config, device, rows)
    for name in IMPLEMENTATIONS:
        try:
            got = _tokens(DenseGraph(model, implementation=name), ids)
        except Unsupported:
            continue
        if problem := _difference(got, wanted):
            return f"dense-graph with {name}: {problem}"
    return ""


def _truth(
    hf_config: PreTrainedConfig, config: RheoConfig, device: torch.device, rows: int
) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """Return a tiny model, prompts and what stock attention makes of them."""
    model = random_model(tiny_config(hf_config), device, torch.float32)
    merge_weights(model)
    prompt_tokens = PROMPT_BLOCKS * config.cache.block_size + 3
    ids = torch.randint(512, (rows, prompt_tokens), generator=torch.Generator().manual_seed(3)).to(device)
    return model, ids, _tokens(Reference(model), ids)


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> str:
    if torch.equal(got, wanted):
        return ""
    row, step = (got != wanted).nonzero()[0].tolist()
    return f"row {row} differs from stock at token {step}"


def _full_budget(config: RheoConfig) -> RheoConfig:
    selection = config.selection
    forced = selection.sink_blocks
    forced += 0 if selection.recent_blocks == "auto" else int(selection.recent_blocks)
    budget = (PROMPT_BLOCKS + 2 + forced) * config.cache.block_size
    overrides = ["cache.device_memory=floor", f"cache.host_memory={HOST_MEMORY}", "selection.dense_layers=[]"]
    return config.with_overrides([*overrides, f"selection.token_budget={budget}"])


def _drop_and_poison(subject: Decoder) -> None:
    """Drop the blocks and spoil their slots, where a block that returns would find its old bytes."""
    kv = subject.cache.executor.cache
    kv.drop_blocks(1.0)
    for layer in kv.full.values():
        layer.pool_blocks[layer.block_in == -1] = float("nan")


def _tokens(
    subject: Decoder, ids: torch.Tensor, before: Callable[[Decoder], None] | None = None
) -> torch.Tensor:
    """Greedy tokens [B, NEW_TOKENS] after `ids`, with `before` run ahead of every step."""
    with torch.no_grad():
        subject.start(ids, fill="prefill", max_length=ids.shape[1] + NEW_TOKENS)
        tokens = []
        for _ in range(NEW_TOKENS):
            if before is not None:
                before(subject)
            subject.step()
            tokens.append(subject.tokens())
        result = torch.cat(tokens, 1).cpu()
        subject.close()
    return result
