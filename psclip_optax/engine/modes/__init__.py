"""The ways to one batch's gradient: a module for each mode."""
