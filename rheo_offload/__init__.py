"""RheoServe: long-context decoding with the KV cache in host memory and a small attended set on the GPU."""

from rheo_offload.config import RheoConfig
from rheo_offload.errors import (
    CacheError,
    ConfigError,
    DeviceMemoryError,
    HostMemoryError,
    NonFiniteError,
    RheoError,
    UnsupportedModelError,
)
from rheo_offload.metrics.stats import Stats
from rheo_offload.model.hf_cache import RheoCache
from rheo_offload.model.offload import offload, restore

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "ConfigError",
    "DeviceMemoryError",
    "HostMemoryError",
    "NonFiniteError",
    "RheoCache",
    "RheoConfig",
    "RheoError",
    "Stats",
    "UnsupportedModelError",
    "offload",
    "restore",
]
