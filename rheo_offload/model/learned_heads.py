"""Side weights of selection methods: small learned heads, a few tensors a layer, kept beside a model in one file.

A side file is a safetensors file. Its tensors are called `model.layers.<layer_idx>.<name>`, as in the checkpoints of
the methods' authors, and its metadata says which model it was made for (`HeadsInfo`). `save_heads` and `read_heads`
know no method: any method names its tensors, `shape_problems` checks them.

NOSA's head (arXiv:2510.13602, thunlp/NOSA), the same as DMA's (arXiv:2508.02124, SmallDoges/flash-dmattn), turns the
values of a token into one number per KV head, high for tokens that will be attended to:

    bias = A * softplus(W v + c)        v: the values of all KV heads, one after the other (values have no RoPE)
    self_attn.delta.weight [Hkv, Hkv * D] is W, self_attn.delta.bias [Hkv] is c (optional), self_attn.A [Hkv]
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rheo_offload.errors import HeadsError
from rheo_offload.selection.learned_bias import LearnedBias
from rheo_offload.types import AttentionCall, LayerSpec

__all__ = [
    "BiasHead",
    "HeadsFile",
    "HeadsInfo",
    "attach_heads",
    "bias_heads",
    "detach_heads",
    "fill_bias",
    "info_problems",
    "load_heads",
    "read_heads",
    "read_own_heads",
    "save_heads",
    "shape_problems",
]

FORMAT = "rheo-heads-1"
BIAS_TENSORS = ("self_attn.delta.weight", "self_attn.delta.bias", "self_attn.A")

Layers = Mapping[int, Mapping[str, Tensor]]
Shapes = Mapping[str, tuple[int, ...]]

ATTRIBUTE = "_rheo_bias"  # of an attention module, while its model is offloaded
_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsInfo:
    """What a side file says of itself."""

    model_type: str
    """`config.model_type` of the decoder it was made for."""
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    method: str
    """Which selection method the tensors belong to."""
    provenance: str
    """Where they come from: for example the fit (data, tokens, seed) or the checkpoint."""
    gate_block_size: int = 0
    """Tokens in the blocks that gates were fitted to; 0: no gates, or the file does not say."""

    @classmethod
    def of(
        cls,
        specs: Sequence[LayerSpec],
        *,
        model_type: str,
        method: str,
        provenance: str,
        gate_block_size: int = 0,
    ) -> Self:
        """Describe a file for the model with these attention layers."""
        first = specs[0]
        return cls(
            model_type=model_type,
            num_layers=len(specs),
            num_q_heads=first.num_q_heads,
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_dim,
            method=method,
            provenance=provenance,
            gate_block_size=gate_block_size,
        )


@dataclass(frozen=True, slots=True)
class HeadsFile:
    """The contents of a side file, on the CPU."""

    layers: Layers
    """layer_idx -> tensor name -> tensor."""
    info: HeadsInfo | None
    """None: a checkpoint of the model itself, which has no such metadata."""


@dataclass(frozen=True, slots=True)
class BiasHead:
    """The head of one layer; see the module."""

    weight: Tensor  # [Hkv, Hkv * D]
    scale: Tensor  # [Hkv], A
    offset: Tensor | None = None  # [Hkv], c

    def __call__(self, v: Tensor) -> Tensor:
        """Return the bias fp32 [B, Hkv, Q] of values [B, Hkv, Q, D], differentiably; the op `token_bias` is its twin.

        The product is taken in the head's dtype.
        """
        joined = v.transpose(1, 2).flatten(2).to(self.weight.dtype)  # [B, Q, Hkv * D]
        x = torch.nn.functional.linear(joined, self.weight, self.offset).float()
        return (self.scale.float() * torch.nn.functional.softplus(x)).transpose(1, 2)

    def to(self, device: torch.device, dtype: torch.dtype) -> "BiasHead":
        """Return a copy on `device` whose product runs in `dtype`."""
        offset = None if self.offset is None else self.offset.to(device, dtype)
        weight = self.weight.to(device, dtype).contiguous()
        return BiasHead(weight, self.scale.to(device, torch.float32).contiguous(), offset)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names they have in a file."""
        found = {"self_attn.delta.weight": self.weight, "self_attn.A": self.scale}
        return found if self.offset is None else found | {"self_attn.delta.bias": self.offset}


# ---- files ---------------------------------------------------------------------------------------------------------


def save_heads(path: str | Path, layers: Layers, info: HeadsInfo) -> None:
    """Write a side file.

    Args:
        path: of the file, `*.safetensors`; written anew.
        layers: layer_idx -> tensor name (for example `self_attn.A`) -> tensor.
        info: for which model and method they are.
    """
    tensors = {
        f"model.layers.{i}.{name}": tensor.detach().contiguous().cpu()
        for i, named in layers.items()
        for name, tensor in named.items()
    }
    metadata = {"format": FORMAT} | {key: str(value) for key, value in dataclasses.asdict(info).items()}
    save_file(tensors, Path(path), metadata)


def read_heads(path: str | Path, names: Collection[str] | None = None) -> HeadsFile:
    """Read a side file, or the same tensors out of a checkpoint.

    Args:
        path: a safetensors file, or the directory of a checkpoint, of which all of them are looked through.
        names: tensors to read (None: all), so that of a checkpoint little is read.

    Raises:
        HeadsError: there is no such file, it is no safetensors file, or its metadata is incomplete.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise HeadsError([f"{path} holds no safetensors file"])
    layers: dict[int, dict[str, Tensor]] = {}
    info = None
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                info = info or _info_of(opened.metadata() or {}, file)
                for key, i, name in _layer_tensors(opened.keys(), names):
                    layers.setdefault(i, {})[name] = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise HeadsError([f"cannot read {file}: {error}"]) from error
    return HeadsFile(layers, info)


def read_own_heads(model: torch.nn.Module, names: Collection[str]) -> HeadsFile:
    """Return those tensors of that name which the model itself has (none: `layers` is empty)."""
    state = model.state_dict()
    layers: dict[int, dict[str, Tensor]] = {}
    for key, i, name in _layer_tensors(state, names):
        layers.setdefault(i, {})[name] = state[key]
    return HeadsFile(layers, None)


def _layer_tensors(keys: Collection[str], names: Collection[str] | None) -> Iterator[tuple[str, int, str]]:
    for key in keys:
        found = _KEY.search(key)
        if found and (names is None or found[2] in names):
            yield key, int(found[1]), found[2]


def _info_of(metadata: Mapping[str, str], file: Path) -> HeadsInfo | None:
    if metadata.get("format") != FORMAT:
        return None
    values: dict[str, Any] = {}
    try:
        for field in dataclasses.fields(HeadsInfo):
            if field.name not in metadata and field.default is not dataclasses.MISSING:
                continue
            values[field.name] = int(metadata[field.name]) if field.type is int else metadata[field.name]
    except (KeyError, ValueError) as error:
        raise HeadsError([f"{file}: its metadata lacks a usable {field.name}"]) from error
    return HeadsInfo(**values)


# ---- checks --------------------------------------------------------------------------------------------------------


def info_problems(info: HeadsInfo | None, specs: Sequence[LayerSpec], model_type: str) -> list[str]:
    """Return every way in which a file was made for another model (empty: none, or it does not say)."""
    if info is None:
        return []
    model = HeadsInfo.of(
        specs,
        model_type=model_type,
        method=info.method,
        provenance=info.provenance,
        gate_block_size=info.gate_block_size,
    )
    return [
        f"it was made for {field.name} {getattr(info, field.name)}, the model has {getattr(model, field.name)}"
        for field in dataclasses.fields(HeadsInfo)
        if getattr(info, field.name) != getattr(model, field.name)
    ]


def shape_problems(layers: Layers, wanted: Mapping[int, Shapes], optional: Mapping[int, Shapes]) -> list[str]:
    """Return every tensor that is missing, has another shape or is not finite.

    Args:
        layers: layer_idx -> name -> tensor, as read; others than asked for are left alone.
        wanted: layer_idx -> name -> shape of what must be there.
        optional: likewise, of what may be there.
    """
    problems = []
    for must, asked in ((True, wanted), (False, optional)):
        for i, shapes in asked.items():
            for name, shape in shapes.items():
                tensor = layers.get(i, {}).get(name)
                if tensor is None:
                    problems += [f"layers.{i}.{name} is missing"] if must else []
                elif tuple(tensor.shape) != shape:
                    problems.append(f"layers.{i}.{name} is {list(tensor.shape)}, not {list(shape)}")
                elif not tensor.isfinite().all():
                    problems.append(f"layers.{i}.{name} holds NaN or infinity")
    return problems


def bias_heads(file: HeadsFile, specs: Sequence[LayerSpec], *, model_type: str) -> dict[int, BiasHead]:
    """Return the bias head of every full-attention layer, in the dtype and on the device of the file.

    Raises:
        HeadsError: with everything that is missing, misshapen, not finite, or meant for another model.
    """
    full = [s for s in specs if not s.is_sliding]
    wanted: dict[int, Shapes] = {
        s.layer_idx: {
            "self_attn.delta.weight": (s.num_kv_heads, s.num_kv_heads * s.head_dim),
            "self_attn.A": (s.num_kv_heads,),
        }
        for s in full
    }
    optional: dict[int, Shapes] = {s.layer_idx: {"self_attn.delta.bias": (s.num_kv_heads,)} for s in full}
    problems = info_problems(file.info, specs, model_type)
    problems += shape_problems(file.layers, wanted, optional)
    problems += [
        f"layer {s.layer_idx} has a head and a sliding window: keys in a window carry no bias"
        for s in specs
        if s.is_sliding and not file.layers.get(s.layer_idx, {}).keys().isdisjoint(BIAS_TENSORS)
    ]
    if problems:
        raise HeadsError(problems)
    return {
        i: BiasHead(
            file.layers[i]["self_attn.delta.weight"],
            file.layers[i]["self_attn.A"],
            file.layers[i].get("self_attn.delta.bias"),
        )
        for i in wanted
    }


def load_heads(
    path: str | Path | None, model: torch.nn.Module, specs: Sequence[LayerSpec], *, model_type: str
) -> dict[int, BiasHead]:
    """Return the bias heads of a model, on its device and in its dtype: of a file, or the model's own.

    Args:
        path: `selection.params.weights`, a side file or the directory of a checkpoint; None: the model's own state.
        model: the model that is being offloaded.
        specs: its attention layers.
        model_type: `config.model_type` of its decoder.

    Raises:
        HeadsError: there are none, or they do not fit; every reason at once.
    """
    if path is None:
        file = read_own_heads(model, BIAS_TENSORS)
        if not file.layers:
            raise HeadsError(
                [
                    "selection.params.weights names no file, and the model has no self_attn.delta and self_attn.A"
                ]
            )
    else:
        file = read_heads(path, BIAS_TENSORS)
    one = next(model.parameters())
    heads = bias_heads(file, specs, model_type=model_type)
    return {i: head.to(one.device, one.dtype) for i, head in heads.items()}


# ---- at the attention modules --------------------------------------------------------------------------------------


def attach_heads(
    model: torch.nn.Module,
    heads: Mapping[int, BiasHead],
    selector: LearnedBias,
    token_bias: Callable[..., None],
) -> None:
    """Give the attention modules of a model their heads, by `layer_idx`; `fill_bias` finds them there.

    Args:
        model: which is offloaded.
        heads: layer_idx -> head.
        selector: says what is added to the logits.
        token_bias: the op of that name.
    """
    for module in model.modules():
        head = heads.get(getattr(module, "layer_idx", -1))
        if head is not None:
            setattr(module, ATTRIBUTE, (head, selector, token_bias))


def detach_heads(model: torch.nn.Module) -> None:
    """Undo `attach_heads`; does nothing twice."""
    for module in model.modules():
        module.__dict__.pop(ATTRIBUTE, None)


def fill_bias(module: torch.nn.Module, call: AttentionCall) -> None:
    """Compute the bias of a call's new tokens, rounded as it is stored, where the attention module has a head."""
    attached = getattr(module, ATTRIBUTE, None)
    if attached is not None:
        head, selector, token_bias = attached
        call.bias = call.v.new_empty(call.v.shape[:3])
        token_bias(call.v, head.weight, head.offset, head.scale, call.bias)
        call.bias_scale = selector.logit_factor(call.softmax_scale)
