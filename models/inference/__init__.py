"""(seed, index) → latents → pixels: what decides an image's bytes, in training, in judging and in serving alike.

May know the nets and what describes them, and nothing of training.
"""
