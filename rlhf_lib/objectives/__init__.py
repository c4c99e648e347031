"""The losses and what goes into them: pure functions of tensors on torch and each other."""
