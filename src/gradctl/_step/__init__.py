"""One optimizer step in hand: the order of everything in it."""
