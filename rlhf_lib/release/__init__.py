"""Models on their way out: what they are, in a card, and where they go."""
