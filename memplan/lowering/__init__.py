"""ATen operations become kernels as data, or extern calls."""
