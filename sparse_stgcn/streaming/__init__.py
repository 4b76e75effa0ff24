"""A network frame by frame: caches of frames in place of padding, sliding means in place of means over a clip."""
