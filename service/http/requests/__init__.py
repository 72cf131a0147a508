"""A request on its way: its context and deadline, its query and body within bounds, and the replies that it can get.

They know no route; every other room here builds on them.
"""
