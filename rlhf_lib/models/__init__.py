"""Models from disk, their log-probabilities, sampling from them, and steps on them."""
