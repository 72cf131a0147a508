"""The bundles that requests find: what is on disk, what names mean, what is in memory, and how it is loaded.

bundles.py joins the others; they don't know it.
"""
