"""The commands on a finished bundle: what is in it, whose it is, and what other programs get of it."""
