"""OpenAI's image API, for clients that speak it already.

It knows what all routes know, and turns its requests into theirs.
"""
