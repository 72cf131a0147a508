"""The layers around the routes, from the outside in: names and logs, errors, keys, admission; and other origins.

Pure ASGI. They know the request's context and no route.
"""
