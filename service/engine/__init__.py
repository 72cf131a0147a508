"""Rows of many callers joined into batches, and the nets that compute them on a device.

Knows nothing of HTTP and of files of images.
"""
