"""In which precision a step is computed, and in which its weights are kept."""
