"""What the notebooks teach with: loops to look at, mistakes, exercises, pictures."""
