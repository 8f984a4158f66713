"""One file per data set: how its archive is read."""
