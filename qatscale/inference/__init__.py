"""Trained and exported models at work: text from a prompt, other people's benchmarks."""
