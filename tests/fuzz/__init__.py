"""Damaged and hostile files for every reader: ``PYTHONPATH=tests python -m fuzz --count 100000`` from the repository's root."""
