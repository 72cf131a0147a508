"""The HTTP API: what a request is, the layers around the routes, and every route.

May know the engine and the codecs, but no sockets.
"""
