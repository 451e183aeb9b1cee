"""Other libraries that clip per sample, against their own framework's plain step."""
