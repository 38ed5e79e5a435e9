"""Which operators may be computed again in the backward pass."""

from __future__ import annotations

from functools import lru_cache

#: Operators that are never computed again though nothing random or mutating marks them: they cost time.
EXPENSIVE = [
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "addmv",
    "mv",
    "dot",
    "vdot",
    "convolution",
    "cudnn_convolution",
    "mkldnn_convolution",
    "convolution_backward",
    "sort",
    "topk",
    "unique",
    "unique2",
    "_unique2",
    "cumsum",
    "cumprod",
    "scatter_add",
    "scatter_reduce",
    "index_put",
    "index_add",
    "nonzero",
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
    "_cudnn_attention",
    "embedding_bag",
    "_embedding_bag",
    "_fft",
    "linalg",
    "_linalg",
    "native_dropout",
    "svd",
    "qr",
    "cholesky",
    "inverse",
    "grid_sampler",
    "max_pool3d",
    "rnn",
    "lstm",
    "gru",
    "histc",
    "bincount",
    "_scaled_mm",
    "_int_mm",
    "_grouped_mm",
    "_cdist",
    "_pdist",
    "cdist",
    "ctc_loss",
    "_ctc_loss",
]


@lru_cache(maxsize=4096)
def cheap_again(target: str) -> bool:
    """Whether an operator may be computed again in the backward: what fuses into one pass over its inputs."""
    namespace, name, _ = target.split(".")
    if namespace not in ("aten", "prims", "memplan"):
        return False
    return not any(name == e or (e.startswith("_") and name.startswith(e)) for e in EXPENSIVE)
