"""The paper's own experiments and figures.

May know the losses, the bundles and inference; only the commands know it.
"""
