"""The commands that draw: the paper's figures, and the pictures of the gallery. A file each, as beside this folder.

May know everything in `models`; only `__main__` knows them.
"""
