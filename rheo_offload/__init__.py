"""RheoServe: long-context decoding with the KV cache in host memory and a small attended set on the GPU."""

from rheo_offload.config import RheoConfig
from rheo_offload.engine.engine import Engine, stream
from rheo_offload.engine.request import Request
from rheo_offload.errors import (
    CacheError,
    ConfigError,
    DeviceMemoryError,
    EngineError,
    GraphError,
    HostMemoryError,
    NonFiniteError,
    RequestError,
    RheoError,
    UnsupportedModelError,
)
from rheo_offload.execution.sampler import SamplingParams
from rheo_offload.metrics.stats import Stats
from rheo_offload.model.hf_cache import RheoCache
from rheo_offload.model.offload import offload, restore

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "ConfigError",
    "DeviceMemoryError",
    "Engine",
    "EngineError",
    "GraphError",
    "HostMemoryError",
    "NonFiniteError",
    "Request",
    "RequestError",
    "RheoCache",
    "RheoConfig",
    "RheoError",
    "SamplingParams",
    "Stats",
    "UnsupportedModelError",
    "offload",
    "restore",
    "stream",
]
