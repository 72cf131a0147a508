"""The online side: images out of, and into, the nets of a bundle, over HTTP."""

__version__ = "0.1.0"
