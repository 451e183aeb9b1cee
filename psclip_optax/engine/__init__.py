"""Compute per-sample norms and weighted sums of gradients from layers' inputs and cotangents.

README.md in this folder has a diagram of one call and a glossary.
"""
