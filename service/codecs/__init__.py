"""Encodes arrays of images as files, and decodes uploaded files, which may be hostile, into arrays.

Knows nothing of HTTP or of the nets.
"""
