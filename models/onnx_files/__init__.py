"""ONNX files, offline: nets that leave for other programs, and generators that come from them.

May know bundles, nets and inference; nothing of training, and nothing of serving knows it.
"""
