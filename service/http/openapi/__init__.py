"""The words of the OpenAPI document: every operation's, the document's own, and its examples.

Routes take theirs from routes.py; nothing here answers a request.
"""
