"""Text and benchmark scores from trained and exported models."""
