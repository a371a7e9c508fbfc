"""Directional derivatives by finite differences in float64, and how two derivatives differ."""
