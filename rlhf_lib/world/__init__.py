"""The bundled world: words, grammar, and the true reward of any reply. Imports nothing of ours."""
