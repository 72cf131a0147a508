"""The routes that draw, judge and verify images, and what they share: plans, drawing, streams, entity tags.

The routes of other people's protocols (../v1, ../v2) translate to what stands here.
"""
