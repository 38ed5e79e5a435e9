"""Plans become source text here: Triton, C++ and the wrappers."""
