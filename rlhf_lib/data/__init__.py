"""From rows of a file to token ids: what every stage reads, and what is known of it."""
