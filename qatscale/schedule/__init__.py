"""RunConfig → timeline: segments of steps with their learning rate, AdamW settings and precision. Pure functions."""
