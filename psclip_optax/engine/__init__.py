"""Compute per-sample norms and weighted sums of gradients from layers' inputs and cotangents.

README.md, beside this file, has a picture of one call and a glossary.
"""
