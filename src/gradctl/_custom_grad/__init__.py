"""Gradients other than the derivative: stopped, scaled, reversed, clipped, replaced, given by hand."""
