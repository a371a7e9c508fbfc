"""Control, explain and prove what gradients do in a PyTorch program."""
