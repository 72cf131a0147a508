"""Rows of many callers joined into batches, and the nets that compute them on a device.

Knows nothing of HTTP and of image files. `model_manager` is the way in; `batcher` and `engine` are its two halves.
"""
