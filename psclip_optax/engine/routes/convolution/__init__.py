"""Compute norms of convolutions' gradients: geometry, layouts, and methods."""
