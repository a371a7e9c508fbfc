"""Gradients other than the derivative: stopped, scaled, reversed, clipped, replaced, given by hand."""

from gradctl._custom_grad._backward_with import backward_with
from gradctl._custom_grad._clip import clip
from gradctl._custom_grad._custom_vjp import CustomVjp, custom_vjp
from gradctl._custom_grad._replace import replace
from gradctl._custom_grad._scale import reverse, scale
from gradctl._custom_grad._stop import stop
from gradctl._custom_grad._straight_through import straight_through

__all__ = [
    "CustomVjp",
    "backward_with",
    "clip",
    "custom_vjp",
    "replace",
    "reverse",
    "scale",
    "stop",
    "straight_through",
]
