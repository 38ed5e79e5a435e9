"""memplan: a graph-level memory optimiser for PyTorch."""
