"""What measures memplan against eager PyTorch and Inductor: ``python -m benchmarks.run --help``."""
