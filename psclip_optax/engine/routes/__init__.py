"""Norms of per-sample gradients of one parameter, from what enters and leaves its sites.

A module for each primitive, with the same functions: `supports` tells whether an equation is one,
the others bring arrays into a form in which the axes of every such equation lie alike.
"""
