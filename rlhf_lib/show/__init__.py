"""Tables, figures, widgets and exercises: how notebooks show what was measured."""
