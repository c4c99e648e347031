"""Tables, figures and widgets: how notebooks show what was measured."""
