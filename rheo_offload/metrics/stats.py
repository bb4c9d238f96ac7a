"""What a run did, in one frozen record: latency, locality, bytes, memory."""

from dataclasses import asdict, dataclass, field
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAudit:
    """What the audited steps say of one layer, over the audited rows."""

    layer_idx: int
    captured_mass_mean: float
    """Share of the full softmax that fell on the selected keys, 0..1, mean over query heads and steps."""
    captured_mass_min: float
    output_error_mean: float
    """Relative L2 distance of the attention output from that over all keys, mean over steps."""
    output_error_max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """One run. Ratios are 0..1 and None when nothing was counted; counted where the work happens."""

    prompt_tokens: int
    """Tokens of all rows that were prefilled or fed through the decode path as prompt."""
    new_tokens: int
    decode_steps: int
    ttft_ms: float | None
    itl_p50_ms: float | None
    itl_p95_ms: float | None
    decode_tps: float | None
    """New tokens per second over all rows, after the first."""
    hit_rate: float | None
    """Selected blocks that were resident, tail excluded."""
    hit_rate_unforced: float | None
    """The same without the blocks that are always selected."""
    selected_blocks: int
    selected_blocks_mean: float | None
    """Blocks that a KV head attended to in a step, the open one included, over the layers that select."""
    miss_blocks: int
    evicted_blocks: int
    h2d_bytes: int
    """Misses loaded on demand."""
    warm_h2d_bytes: int
    prefill_h2d_bytes: int
    streamed_h2d_bytes: int
    """Layers kept dense whose history does not fit the pool."""
    audit_h2d_bytes: int
    d2h_bytes: int
    """Write-through of new keys and values."""
    captured_mass_mean: float | None
    captured_mass_min: float | None
    audited_steps: int
    device_kv_bytes: int
    dense_kv_bytes: int
    """What a dense cache of the same tokens would hold on the device."""
    host_kv_bytes: int
    capacity_blocks: int
    block_budget: int
    output_error_mean: float | None = None
    """Relative L2 distance of the audited attention outputs from those over all keys, mean over layers."""
    output_error_max: float | None = None
    logit_kl_mean: float | None = None
    """KL(dense || sparse) of the next token in nats, over the audited rows; None without `audit.logits`."""
    logit_kl_max: float | None = None
    audited_logits: int = 0
    """Rows whose next-token distribution was compared with that of dense decoding."""
    layers: tuple[LayerAudit, ...] = ()
    """What was audited, layer by layer."""
    raised_budgets: dict[int, int] = field(default_factory=dict)
    """Layer index -> blocks, of the layers that `audit.raise_below` gave more than `block_budget`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)

    def table(self) -> str:
        """Return an aligned two-column table for people."""
        mass = _share(self.captured_mass_mean)
        error = f"{_share(self.output_error_mean)} / {_share(self.output_error_max)}"
        blocks = f"{self.selected_blocks:,} / {self.miss_blocks:,}"
        rows = [
            ("prompt tokens", f"{self.prompt_tokens:,}"),
            ("new tokens", f"{self.new_tokens:,}"),
            ("decode steps", f"{self.decode_steps:,}"),
            ("time to first token", _ms(self.ttft_ms)),
            ("inter-token latency p50 / p95", f"{_ms(self.itl_p50_ms)} / {_ms(self.itl_p95_ms)}"),
            ("decode rate", "-" if self.decode_tps is None else f"{self.decode_tps:.1f} tok/s"),
            ("hit rate (without forced blocks)", f"{_share(self.hit_rate)} ({_share(self.hit_rate_unforced)})"),
            ("captured attention mass, mean / min", f"{mass} / {_share(self.captured_mass_min)}"),
            ("attention output error, mean / max", error),
            ("blocks selected / missed / evicted", f"{blocks} / {self.evicted_blocks:,}"),
            ("host to device, misses", _mib(self.h2d_bytes)),
            ("host to device, warm-up / prefill", f"{_mib(self.warm_h2d_bytes)} / {_mib(self.prefill_h2d_bytes)}"),
            ("host to device, dense layers / audit", f"{_mib(self.streamed_h2d_bytes)} / {_mib(self.audit_h2d_bytes)}"),
            ("device to host, write-through", _mib(self.d2h_bytes)),
            ("device KV (a dense cache would hold)", f"{_mib(self.device_kv_bytes)} ({_mib(self.dense_kv_bytes)})"),
            ("host KV", _mib(self.host_kv_bytes)),
            ("attended per KV head and step, mean", _blocks(self.selected_blocks_mean)),
            ("budget / capacity per KV head", f"{self.block_budget} / {self.capacity_blocks} blocks"),
        ]  # fmt: skip
        if self.logit_kl_mean is not None:
            rows.append(
                ("logit KL to dense, mean / max", f"{self.logit_kl_mean:.3g} / {self.logit_kl_max:.3g} nats")
            )
        if self.raised_budgets:
            raised = ", ".join(f"{i}: {blocks}" for i, blocks in self.raised_budgets.items())
            rows.append(("layers with a larger budget", raised))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"


def _blocks(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} blocks"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _mib(value: int) -> str:
    return f"{value / MIB:,.1f} MiB"
