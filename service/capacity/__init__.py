"""What a load needs: `python -m service capacity` runs the service as its operator would, and asks as clients do.

It sees the service from outside only, and knows none of the rooms that serve.
"""
