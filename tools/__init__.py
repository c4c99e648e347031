"""What a maintainer runs by hand, from a checkout; none of it is installed."""
