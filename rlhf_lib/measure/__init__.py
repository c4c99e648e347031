"""What is measured of policies and reward models, and with what certainty."""
