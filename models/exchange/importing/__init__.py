"""Generators that were trained elsewhere: an ONNX file becomes a bundle, offline.

May know bundles, nets and inference; nothing of training, and nothing of serving knows it.
"""
