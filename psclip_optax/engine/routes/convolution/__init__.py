"""Take norms of convolutions' gradients: geometry, layouts, and the ways to the norms."""
