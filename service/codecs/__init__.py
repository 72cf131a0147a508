"""Arrays of images into files, and files into arrays, however hostile.

Knows nothing of HTTP and of nets.
"""
