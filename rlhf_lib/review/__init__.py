"""What was logged, found and published, by this library or by others: checked and compared."""
