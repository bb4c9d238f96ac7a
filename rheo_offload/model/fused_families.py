"""The families whose decoder layers have fused forwards, and what must hold of a layer before it gets one.

Everything that the fused forwards rely on is checked here by name and by exact type, so that after an upgrade of
transformers, and where a module is wrapped, hooked, quantised or patched, the layer stays as it is, with the reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Hooks that only read a module's output and are installed by transformers itself on request.
HARMLESS_HOOKS = "transformers.utils.output_capturing"


def _no_kwargs(attention: Any) -> dict[str, Any]:
    return {}


def _window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


def _config_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


def _window_and_cap(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window, "softcap": attention.attn_logit_softcapping}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one modeling file builds its decoder layer."""

    folder: str
    """Folder of the modeling file in transformers, and with `prefix` the names of its classes."""
    prefix: str
    attention_kwargs: Callable[[Any], dict[str, Any]] = _no_kwargs
    """What its attention passes to the attention function beyond dropout and scaling."""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    act: str = "act_fn"
    eps: str = "variance_epsilon"
    offset: int = 0
    """1: norms multiply by 1 + weight."""
    head_norms: bool = False
    """Queries and keys are normed per head ahead of the rotation."""
    sandwich: bool = False
    """Both branches are normed again ahead of the residual add (four norms a layer)."""

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the layer's norms in the order they run."""
        first = ("input_layernorm", "post_attention_layernorm")
        more = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        return first + more if self.sandwich else first

    def is_class(self, module: nn.Module, suffix: str) -> bool:
        """Whether the module is exactly this family's class of that suffix."""
        kind = type(module)
        home = f"transformers.models.{self.folder}.modeling_{self.folder}"
        return (kind.__module__, kind.__name__) == (home, self.prefix + suffix)


GEMMA: dict[str, Any] = dict(eps="eps", offset=1, sandwich=True)
FAMILIES = (
    Family(folder="llama", prefix="Llama"),
    Family(folder="mistral", prefix="Mistral", attention_kwargs=_config_window),
    Family(folder="qwen2", prefix="Qwen2", attention_kwargs=_window),
    Family(folder="qwen3", prefix="Qwen3", attention_kwargs=_window, head_norms=True),
    Family(folder="smollm3", prefix="SmolLM3", attention_kwargs=_window),
    Family(folder="granite", prefix="Granite"),
    Family(
        folder="phi3",
        prefix="Phi3",
        attention_kwargs=_config_window,
        qkv=("qkv_proj",),
        gate_up=("gate_up_proj",),
        act="activation_fn",
    ),
    Family(folder="gemma2", prefix="Gemma2", attention_kwargs=_window_and_cap, **GEMMA),
    Family(folder="gemma3", prefix="Gemma3", attention_kwargs=_window, head_norms=True, **GEMMA),
)


def family_of(layer: nn.Module) -> Family | None:
    """Return the family whose decoder layer this is."""
    return next((family for family in FAMILIES if family.is_class(layer, "DecoderLayer")), None)


def activation_of(act: Any) -> str | None:
    """Return the fused activation that a module's activation is, or None."""
    if type(act) is nn.SiLU or type(act).__name__ == "SiLUActivation":
        return "silu"
    return "gelu_tanh" if type(act).__name__ == "GELUTanh" else None


def layer_problems(layer: Any, family: Family) -> list[str]:
    """Return why this decoder layer keeps its own forward, one line a reason (empty: it can be fused)."""
    parts = [*family.norms, "self_attn", "mlp", *(f"self_attn.{n}" for n in (*family.qkv, "o_proj"))]
    parts += [f"mlp.{name}" for name in (*family.gate_up, "down_proj")]
    parts += ["self_attn.q_norm", "self_attn.k_norm"] if family.head_norms else []
    try:
        modules = {name: layer.get_submodule(name) for name in parts}
    except AttributeError as error:
        return [f"its parts are not as expected: {error}"]
    problems = [f"{name or 'the layer'} {what}" for name, what in _module_problems(layer, modules, family)]
    return problems or [*_tensor_problems(modules, family), *_shape_problems(layer, family)]


def _module_problems(
    layer: nn.Module, modules: dict[str, nn.Module], family: Family
) -> Iterator[tuple[str, str]]:
    for name, module in {"": layer, **modules}.items():
        if name in ("", "self_attn", "mlp") or name.endswith("norm"):
            suffix = {"": "DecoderLayer", "self_attn": "Attention", "mlp": "MLP"}.get(name, "RMSNorm")
            if not family.is_class(module, suffix):
                yield name, f"is a {type(module).__name__}"
        elif type(module) is not nn.Linear:
            yield name, f"is a {type(module).__name__}, not a plain Linear"
        if "forward" in module.__dict__:
            yield name, "has a forward of its own already"
        if getattr(module, "_compiled_call_impl", None) is not None:
            yield name, "is compiled"
        if _is_hooked(module, reading_allowed=name in ("", "self_attn")):
            yield name, "has hooks"


def _tensor_problems(modules: dict[str, Any], family: Family) -> Iterator[str]:
    parameters = [p for m in modules.values() for p in m.parameters(recurse=False)]
    kinds = {(type(p.data), p.dtype, p.device, p.layout) for p in parameters}
    kind, dtype, device, layout = next(iter(kinds))
    if len(kinds) > 1 or kind is not torch.Tensor or dtype not in DTYPES or layout is not torch.strided:
        yield f"it mixes or wraps parameters: {sorted(f'{t.__name__} {d} on {v}' for t, d, v, _ in kinds)}"
    if modules["mlp.down_proj"].bias is not None:
        yield "mlp.down_proj has a bias"
    for names in ([f"self_attn.{n}" for n in family.qkv], [f"mlp.{n}" for n in family.gate_up]):
        if len({modules[name].bias is None for name in names}) > 1:
            yield f"only some of {', '.join(names)} have a bias"


def _is_hooked(module: nn.Module, *, reading_allowed: bool) -> bool:
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = module._forward_hooks.values()
    return any(not reading_allowed or getattr(h, "__module__", "") != HARMLESS_HOOKS for h in hooks)


def _shape_problems(layer: Any, family: Family) -> Iterator[str]:
    attention, mlp = layer.self_attn, layer.mlp
    try:
        heads = (attention.config.num_attention_heads, attention.config.num_key_value_heads)
        rows = attention.head_dim * (heads[0] + 2 * heads[1])
        epsilons = {getattr(getattr(layer, name), family.eps) for name in family.norms}
        family.attention_kwargs(attention)
        act = getattr(mlp, family.act)
        float(attention.scaling)
    except AttributeError as error:
        yield f"an attribute is missing: {error}"
        return
    found = sum(getattr(attention, name).out_features for name in family.qkv)
    if found != rows:
        yield f"its projections give {found} channels, its config {rows}"
    if len(epsilons) != 1:
        yield "its norms have different eps"
    if activation_of(act) is None:
        yield f"activation {type(act).__name__} has no fused form"
