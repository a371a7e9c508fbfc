"""Meeting points with training frameworks; each is imported only when its name is asked for."""
