"""Rows of many callers joined into batches, and the nets that compute them on a device.

Knows nothing of HTTP and of image files. `model_manager` is the way in; `bundles` says what can be asked for and has it
loaded, `batching` joins rows, `engine` computes them.
"""
