"""Training: the two-stage method (generator), the epoch loop (loop) and its resume file (state)."""
