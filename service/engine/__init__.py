"""Rows of many callers joined into batches, and the nets that compute them on a device.

Knows nothing of HTTP and of image files. `model_manager` is the way in; `batching` joins rows, `engine` computes them.
"""
