"""Sockets, HTTP/1.1, signals, several workers, and what starts them.

May know every other room of the service; none of them knows this one.
"""
