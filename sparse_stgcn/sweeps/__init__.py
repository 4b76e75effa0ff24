"""Many training runs from one file: which there are, how they are run, what they gave, and the tables of it."""
