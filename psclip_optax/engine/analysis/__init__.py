"""Analyse the jaxpr of a loss: each claim is proven, or not made."""
