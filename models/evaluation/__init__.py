"""Real images and generated ones → scores.

May know data and inference, and nothing of training.
"""
