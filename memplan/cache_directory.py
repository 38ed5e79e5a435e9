"""The cache directory that compiling uses, for the command line."""

from __future__ import annotations

from .ir.config import Config, from_environment
from .runtime.cache import Cache, CacheInfo


def cache_directory(path: str | None = None) -> Cache:
    """The cache in a directory; by default in the one that options and the environment choose."""
    return Cache(path or from_environment(Config()).cache_dir)


__all__ = ["Cache", "CacheInfo", "cache_directory"]
