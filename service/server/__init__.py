"""Sockets, HTTP/1.1, signals, and the processes of the service.

May import everything else in the service; nothing else imports it, except `python -m service`.
"""
