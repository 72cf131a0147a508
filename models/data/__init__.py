"""Folders, `.npz` and IDX files → checked splits of uint8 images.

Knows nothing of nets.
"""
