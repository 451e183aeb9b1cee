"""Per-sample norms and weighted sums of gradients from what enters and leaves each layer."""
