"""An image file of any kind → pixels as nets see them, the same in training and in serving.

Knows no other room. The decoder processes of the service import it, so it needs nothing but NumPy and Pillow.
"""
