"""The whole study: which stage needs which, all of them side by side, and their report."""
