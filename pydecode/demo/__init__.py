"""What ``pydecode demo`` shows: two real trained models, decoded in parallel."""
