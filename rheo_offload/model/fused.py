"""Fused decoder layers: `fuse(model)` gives layers of known families a forward of few launches; `unfuse` takes it away.

Eight launches a layer besides attention: norm, one product for q, k and v, rotation (with the per-head norms), output
projection, residual add with the next norm, one product for gate and up, activation, down projection that adds to the
residual stream. Products of at most 16 rows, the output embedding's too, are done by `linear_few` where the launch
table says that it beats torch. Nothing is patched but `forward` on instances. The merged weights are one buffer that
the model's own parameters become views of, so there is no second copy and names, shapes and `state_dict` stay as they
were.

With gradients enabled, under autocast or in training mode every module runs its own forward.
"""

import copy
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from rheo_offload.errors import UnsupportedModelError
from rheo_offload.model.fused_families import Family, activation_of, family_of, layer_problems
from rheo_offload.ops import kernels_for, of_kernels

logger = logging.getLogger("rheo_offload")

STATE = "_rheo_fused"
# The check at attach: update of a layer, fused against its own forward, on a few random tokens.
CHECK_TOKENS = 3
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True)
class FusedReport:
    """What `fuse` replaced, and why it left the rest."""

    fused: tuple[str, ...]
    """Names of the decoder layers and final norms that have a fused forward."""
    left: dict[str, str]
    """Name of a layer that keeps its own forward -> the reasons; the empty name stands for the whole model."""

    @property
    def is_complete(self) -> bool:
        """Whether every decoder layer is fused."""
        return bool(self.fused) and not self.left

    def reasons(self) -> list[str]:
        """Return the different reasons, each with the first layer it holds for and how many more."""
        where: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            where.setdefault(reason, []).append(name)
        lines = []
        for reason, names in where.items():
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            lines.append(f"{names[0] or 'the model'}{more}: {reason}")
        return lines

    def __str__(self) -> str:
        """Return one line for the log."""
        if self.is_complete:
            return f"fused forward on {len(self.fused)} modules"
        return f"fused forward on {len(self.fused)} modules; not on {'; '.join(self.reasons())}"


class Merged:
    """Linear layers over one input as one product, over one buffer that their own parameters are views of.

    Two module trees over the same parameters share the buffer. What moves the parameters (another dtype or device,
    `load_state_dict(assign=True)`) is noticed in the next call, which merges again.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str], ops: "_Ops") -> None:
        """Take the parts by name from the module that owns them; merged at the first call or by `merge`."""
        self.owner, self.names, self.ops = owner, tuple(names), ops
        self.weight: Tensor
        self.bias: Tensor | None
        self._pointers: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Merged":
        return Merged(copy.deepcopy(self.owner, memo), self.names, self.ops)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [T, in] times every part, [T, sum of outs].

        Raises:
            UnsupportedModelError: a part was replaced or wrapped after it was fused.
        """
        parts: Any = [self.owner._modules[name] for name in self.names]
        if [p.weight.data_ptr() for p in parts] != self._pointers or any(
            type(p) is not nn.Linear for p in parts
        ):
            self.merge()
        return _product(self.ops(x), x, self.weight, self.bias)

    def merge(self) -> None:
        """Bring the parts' parameters into one buffer."""
        parts: Any = [self.owner._modules[name] for name in self.names]
        for name, part in zip(self.names, parts, strict=True):
            if type(part) is not nn.Linear:
                what = f"{name} became a {type(part).__name__} after it was fused"
                raise UnsupportedModelError(
                    [f"{what}; restore() the model first, change it, offload() it again"]
                )
        # Inference tensors could never be trained or loaded into again.
        with torch.inference_mode(False), torch.no_grad():
            self.weight = _back_to_back([p.weight for p in parts])
            self.bias = None if parts[0].bias is None else _back_to_back([p.bias for p in parts])
        self._pointers = [p.weight.data_ptr() for p in parts]


def _back_to_back(parameters: Sequence[Tensor]) -> Tensor:
    """Return one tensor of all parameters' rows, making the parameters views of it unless they are already."""
    first = parameters[0].data
    rows = sum(p.shape[0] for p in parameters)
    shape = (rows, *first.shape[1:])
    end = first.data_ptr()
    for p in parameters:
        if p.data_ptr() != end or not p.is_contiguous() or p.dtype != first.dtype:
            break
        if p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            break
        end += p.nbytes
    else:
        return first.as_strided(shape, first.stride())
    merged = torch.empty(shape, dtype=first.dtype, device=first.device)
    start = 0
    for p in parameters:
        part = merged[start : start + p.shape[0]]
        part.copy_(p.data)
        p.data = part  # the old weight is freed here, ahead of the next allocation
        start += p.shape[0]
    return merged


class _LayerState:
    """What the fused forwards of one decoder layer share."""

    def __init__(self, layer: Any, family: Family) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.family = family
        self.ops = _Ops()
        self.qkv = Merged(attention, family.qkv, self.ops)
        self.gate_up = Merged(mlp, family.gate_up, self.ops)
        self.act = activation_of(getattr(mlp, family.act))
        heads, kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self.heads = [heads, kv_heads, kv_heads]
        self.norm = dict(eps=getattr(layer.input_layernorm, family.eps), offset=family.offset)
        self.multiplier = float(getattr(layer, "residual_multiplier", 1.0))


class _Ops:
    """The ops of the device a tensor is on, looked up once: Triton on a GPU, plain torch on the CPU.

    With them `few_rows_config`, which says where one of them beats torch.
    """

    def __init__(self) -> None:
        self._of: dict[torch.device, SimpleNamespace] = {}

    def __call__(self, x: Tensor) -> SimpleNamespace:
        device = x.device
        if device not in self._of:
            self._of[device] = kernels_for(device, "triton" if device.type == "cuda" else "reference")
            self._of[device].few_rows_config = of_kernels("launch", "few_rows_config")
        return self._of[device]


def _product(
    ops: SimpleNamespace, x: Tensor, weight: Tensor, bias: Tensor | None = None, stream: Tensor | None = None
) -> Tensor:
    """Return x [T, in] times weight [out, in] transposed, or `stream` [T, out] after adding it there."""
    config = ops.few_rows_config(*weight.shape, x.shape[0], x.itemsize, x.device)
    if config is not None and bias is None and x.stride(1) == weight.stride(1) == 1:
        out = x.new_empty(x.shape[0], weight.shape[0]) if stream is None else stream
        ops.linear_few(x, weight, out, add=stream is not None)
        return out
    return F.linear(x, weight, bias) if stream is None else stream.addmm_(x, weight.t())


def _runs_stock(module: nn.Module, x: Tensor) -> bool:
    return module.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)


def _layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a decoder layer; `hidden_states` [B, Q, H] is only read."""
    if args or _runs_stock(self, hidden_states):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    state: _LayerState = self.__dict__[STATE]
    ops, norm = state.ops(hidden_states), state.norm
    weights = [getattr(self, name).weight for name in state.family.norms]
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    normed = torch.empty_like(x)
    ops.rms_norm(x, weights[0], normed, **norm)
    branch, _ = self.self_attn(hidden_states=normed.view(hidden_states.shape), **kwargs)
    stream = branch.reshape(x.shape)
    down = self.mlp.down_proj.weight
    if state.family.sandwich:
        ops.rms_norm(stream, weights[2], normed, residual=x, branch_weight=weights[1], **norm)
        branch = _product(ops, _activated(state, normed), down)
        ops.rms_norm(branch, None, None, residual=stream, branch_weight=weights[3], **norm)
        return branch.view(hidden_states.shape)
    ops.rms_norm(stream, weights[1], normed, residual=x, multiplier=state.multiplier, **norm)
    if state.multiplier == 1:
        _product(ops, _activated(state, normed), down, stream=stream)
    else:
        stream.addmm_(_activated(state, normed), down.t(), alpha=state.multiplier)
    return stream.view(hidden_states.shape)


def _activated(state: _LayerState, x: Tensor) -> Tensor:
    gate_up = state.gate_up(x)
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    state.ops(x).gated_act(gate_up, out, act=state.act)
    return out


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run an attention module: same calls to the cache and the attention function as its own forward."""
    if _runs_stock(self, hidden_states):
        return type(self).forward(  # type: ignore[no-any-return]
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    state: _LayerState = self.__dict__[STATE]
    shape = hidden_states.shape[:-1]
    qkv = state.qkv(hidden_states.reshape(-1, hidden_states.shape[-1]))
    heads = qkv.view(qkv.shape[0], -1, self.head_dim).split(state.heads, 1)
    if getattr(self, "use_rope", True):
        assert position_embeddings is not None
        cos, sin = (t.reshape(-1, t.shape[-1]) for t in position_embeddings)
        weights = (self.q_norm.weight, self.k_norm.weight) if state.family.head_norms else ()
        state.ops(qkv).rope(*heads[:2], cos, sin, *weights, **state.norm)
    q, k, v = (t.view(*shape, *t.shape[1:]).transpose(1, 2) for t in heads)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, sys.modules[type(self).__module__].eager_attention_forward
    )
    out, weights = attend(
        self, q, k, v, attention_mask,
        dropout=0.0, scaling=self.scaling, **state.family.attention_kwargs(self), **kwargs,
    )  # fmt: skip
    # two dims: a strided 3-D input (which an attention function may return) would become a product row by row
    return self.o_proj(out.reshape(shape.numel(), -1)).view(*shape, -1), weights


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    """Run a linear layer that is not merged with others: an output projection, the output embedding."""
    if _runs_stock(self, x):
        return F.linear(x, self.weight, self.bias)
    flat = x.reshape(-1, x.shape[-1])
    return _product(self.__dict__[STATE].ops(x), flat, self.weight, self.bias).view(*x.shape[:-1], -1)


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Run the norm behind the last layer."""
    if _runs_stock(self, hidden_states):
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    state = self.__dict__[STATE]
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    out = torch.empty_like(x)
    state.ops(x).rms_norm(x, self.weight, out, **state.norm)
    return out.view(hidden_states.shape)


def fuse(model: PreTrainedModel) -> FusedReport:
    """Give every decoder layer of a known family, and the norm behind the layers, its fused forward, in place.

    A layer that is not exactly what its family's modeling file builds, or whose fused forward does not give what its
    own gives on a few random tokens, is left alone. Waits for the device. The weights of one projection exist twice
    for a moment; parameters get new addresses, so a CUDA graph captured before must not be replayed after.

    Args:
        model: in eval mode, on one device. Fusing twice changes nothing.
    """
    fused: list[str] = []
    left: dict[str, str] = {}
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, layer in model.named_modules():
        family = family_of(layer)
        if family is None:
            continue
        if STATE not in layer.__dict__:
            problems = layer_problems(layer, family)
            if any(owners[id(p)] > 1 for p in layer.parameters()):
                problems.append("shares parameters with another module")
            problems = problems or _fuse_layer(layer, family)
            if problems:
                left[name] = "; ".join(problems)
                continue
        fused.append(name)
    for name, stack in model.named_modules():
        if _fuse_final_norm(stack):
            fused.append(f"{name}.norm")
    head: Any = model.get_output_embeddings() if fused else None
    if type(head) is nn.Linear and type(head.weight.data) is Tensor and "forward" not in head.__dict__:
        head.__dict__[STATE] = SimpleNamespace(ops=_Ops())
        head.forward = MethodType(_linear_forward, head)  # type: ignore[method-assign]
    if not fused and not left:
        left[""] = f"{type(model).__name__} is of no family with fused layers"
    return FusedReport(tuple(fused), left)


def fuse_as_configured(model: PreTrainedModel, mode: str) -> FusedReport | None:
    """Fuse as `execution.fused` says; None when nothing was tried.

    Args:
        model: as in `fuse`.
        mode: `auto`: on a GPU, what can be; `on`: everything, anywhere; `off`: nothing.

    Raises:
        UnsupportedModelError: `on`, and a layer cannot be fused. No layer is then.
    """
    if mode == "off" or (mode == "auto" and model.device.type != "cuda"):
        return None
    report = fuse(model)
    if mode == "on" and not report.is_complete:
        unfuse(model)
        raise UnsupportedModelError([f"execution.fused=on: {reason}" for reason in report.reasons()])
    logger.info("execution.fused=%s: %s", mode, report)
    return report


def unfuse(model: nn.Module) -> None:
    """Give every module its own forward back. Parameters stay views of merged buffers: that is not observable."""
    for module in model.modules():
        if module.__dict__.pop(STATE, None) is not None:
            module.__dict__.pop("forward", None)


def _fuse_layer(layer: Any, family: Family) -> list[str]:
    """Install the forwards of one layer and compare them with its own; returns why they were taken off again."""
    with torch.no_grad():
        inputs, keywords = _check_inputs(layer)
        truth = layer(inputs, **keywords)
        try:
            _install(layer, family)
            difference = (layer(inputs, **keywords) - truth).float().norm()
        except BaseException:
            unfuse(layer)
            raise
        update, total = (truth - inputs).float().norm(), truth.float().norm()
        allowed = LIMIT[truth.dtype] * update + 2 * torch.finfo(truth.dtype).eps * total
        if not difference <= allowed:  # NaN is no agreement
            unfuse(layer)
            return [
                f"its fused forward differs from its own by {float(difference / update):.1e} of the update"
            ]
    return []


def _install(layer: Any, family: Family) -> None:
    state = _LayerState(layer, family)
    state.qkv.merge()
    state.gate_up.merge()
    if state.qkv.weight.device.type == "cuda":
        torch.cuda.empty_cache()  # the old weights' blocks fit nothing that comes: 9 GiB in an 8B model
    attention = layer.self_attn
    for module, forward in (
        (layer, _layer_forward), (attention, _attention_forward), (attention.o_proj, _linear_forward),
    ):  # fmt: skip
        module.__dict__[STATE] = state
        module.forward = MethodType(forward, module)


def _check_inputs(layer: Any) -> tuple[Tensor, dict[str, Any]]:
    weight = layer.input_layernorm.weight
    generator = torch.Generator(weight.device).manual_seed(0)

    def random(width: int) -> Tensor:
        return torch.randn(1, CHECK_TOKENS, width, generator=generator, device=weight.device)

    angles = random(layer.self_attn.head_dim // 2).repeat(1, 1, 2)
    rotary = (angles.cos().to(weight.dtype), angles.sin().to(weight.dtype))
    return random(len(weight)).to(weight.dtype), {"position_embeddings": rotary, "attention_mask": None}


def _fuse_final_norm(stack: nn.Module) -> bool:
    """Fuse the norm of a stack whose layers are all fused; returns whether it has one that is."""
    layers = getattr(stack, "layers", None)
    norm: Any = getattr(stack, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not isinstance(norm, nn.Module):
        return False
    states: list[Any] = [layer.__dict__.get(STATE) for layer in layers]
    if None in states or not states[0].family.is_class(norm, "RMSNorm"):
        return False
    if STATE not in norm.__dict__:
        first: Any = layers[0]
        hooked = norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__
        if hooked or norm.weight.dtype != first.input_layernorm.weight.dtype:
            return False
        eps = getattr(norm, states[0].family.eps)
        norm.__dict__[STATE] = SimpleNamespace(ops=_Ops(), norm=states[0].norm | {"eps": eps})
        norm.forward = MethodType(_norm_forward, norm)
    return True
