"""The HTTP API: request contexts, middleware, schemas and every route.

May know the engine and the codecs, but no sockets.
"""
