"""The paper's own experiments and figures, and the pictures of the gallery.

May know data, bundles, inference, scores and losses; only the commands know it.
"""
