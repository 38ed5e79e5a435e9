"""Builds, caches, tunes, owns pools and launches."""
