"""What others published and logged, and what one has oneself: checked, compared, tried."""
