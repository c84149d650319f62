"""Training. `training` is what stages do around the one loop, `engine`; the others are parts of these two."""
