"""Where and for how long people run it: hosted notebooks, sessions that end, many studies."""
