"""One training step, the run around it, and the run's record on disk.

May know data, nets and evaluation; the commands and the experiments know it.
"""
