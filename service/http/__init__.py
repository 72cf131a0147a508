"""What a request is, and every route: what is asked, whether it is allowed, and what is answered.

May know the engine and the codecs, and no sockets.
"""
