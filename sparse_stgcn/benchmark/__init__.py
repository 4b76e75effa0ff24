"""Honest timing: paired runs, checked results, the best dense engines beside ours."""
