"""The file of a plan of reuse (`rheo trace plan`): which layers take the selection of which, for one model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from rheo_offload.errors import ConfigError
from rheo_offload.model.specs import config_hash

FORMAT = 1


def read_reuse_plan(path: str, config: PreTrainedConfig) -> dict[int, int]:
    """Return layer -> source of a plan for the model of `config`.

    Raises:
        ConfigError: no such file, not a plan, or one of another model.
    """
    key = "selection.reuse_layers"
    try:
        plan: Mapping[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        version, found, model = plan["format"], plan["config_hash"], plan["model"]
        layers = {int(layer): int(source) for layer, source in plan["layers"].items()}
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path!r}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{key}: {path!r} is no plan that `rheo trace plan` wrote") from error
    if version != FORMAT:
        raise ConfigError(f"{key}: {path!r} has format {version}, this version reads {FORMAT}")
    if found != config_hash(config):
        raise ConfigError(
            f"{key}: {path!r} is a plan for {model} (config {found}), not for this {config.model_type} model "
            f"({config_hash(config)}); record a trace of this one and plan again"
        )
    return layers
