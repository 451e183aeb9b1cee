"""Take per-sample norms and weighted sums of gradients from what enters and leaves each layer.

README.md, beside this file, has a picture of one call and the words that one must know.
"""
