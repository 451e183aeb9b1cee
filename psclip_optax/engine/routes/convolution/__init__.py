"""Convolutions: geometry, layouts, and the ways to the norms of their gradients."""
