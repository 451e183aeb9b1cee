"""Read what the jaxpr of a loss says: each claim is proven, or not made."""
