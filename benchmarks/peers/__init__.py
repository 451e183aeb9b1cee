"""Compares libraries that clip per sample with plain steps of their frameworks."""
